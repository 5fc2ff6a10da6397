"""Operations: a name, a shape rule, a forward on arrays and a gradient rule each. NumPy's names and arguments."""

from gpulayers.ops import activations
from gpulayers.ops.activations import (
    elu,
    erf,
    exponential,
    gelu,
    hard_sigmoid,
    leaky_relu,
    linear,
    log_softmax,
    mish,
    relu,
    relu6,
    selu,
    sigmoid,
    silu,
    softmax,
    softplus,
    softsign,
    swish,
)
from gpulayers.ops.arithmetic import (
    absolute,
    add,
    ceil,
    clip,
    cos,
    divide,
    equal,
    exp,
    expm1,
    floor,
    floor_divide,
    greater,
    greater_equal,
    isfinite,
    isinf,
    isnan,
    less,
    less_equal,
    log,
    log1p,
    logical_and,
    logical_not,
    logical_or,
    logical_xor,
    maximum,
    minimum,
    multiply,
    negative,
    not_equal,
    power,
    reciprocal,
    remainder,
    rint,
    rsqrt,
    sign,
    sin,
    sqrt,
    square,
    subtract,
    tanh,
    where,
)
from gpulayers.ops.convolution import (
    convolution,
)
from gpulayers.ops.creation import (
    arange,
    constant,
    eye,
    full,
    full_like,
    ones,
    ones_like,
    zeros,
    zeros_like,
)
from gpulayers.ops.indexing import (
    boolean_mask,
    gather,
    getitem,
    one_hot,
    take,
    take_along_axis,
)
from gpulayers.ops.nn import (
    bias_add,
    dropout,
    l2_normalize,
    moments,
    sigmoid_cross_entropy_with_logits,
    softmax_cross_entropy_with_logits,
    sparse_softmax_cross_entropy_with_logits,
)
from gpulayers.ops.operation import (
    OPERATIONS,
    Operation,
    Spec,
    broadcast_like,
    sum_to_like,
)
from gpulayers.ops.pooling import (
    avg_pool,
    max_pool,
)
from gpulayers.ops.products import (
    dot,
    einsum,
    matmul,
    outer,
    tensordot,
)
from gpulayers.ops.random import (
    bernoulli,
    random_integers,
    random_normal,
    random_uniform,
    set_seed,
    truncated_normal,
)
from gpulayers.ops.reductions import (
    all,
    any,
    argmax,
    argmin,
    count_nonzero,
    cumsum,
    logsumexp,
    max,
    mean,
    min,
    prod,
    std,
    sum,
    var,
)
from gpulayers.ops.shaping import (
    astype,
    broadcast_to,
    cast,
    concatenate,
    expand_dims,
    flip,
    identity,
    moveaxis,
    pad,
    rank,
    ravel,
    repeat,
    reshape,
    reverse,
    roll,
    shape_of,
    size,
    split,
    split_sizes,
    squeeze,
    stack,
    stop_gradient,
    swapaxes,
    tile,
    transpose,
    unstack,
)

# Other names that NumPy has for the same functions.
abs = absolute
pow = power
amax = max
amin = min
permute_dims = transpose
concat = concatenate
