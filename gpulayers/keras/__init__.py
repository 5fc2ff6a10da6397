"""The modern family under TensorFlow's names: ``tf.keras``. This file only names things."""

from gpulayers import constraints as constraints
from gpulayers import initializers as initializers
from gpulayers import losses as losses
from gpulayers import metrics as metrics
from gpulayers import optimizers as optimizers
from gpulayers import regularizers as regularizers
from gpulayers.keras import backend as backend
from gpulayers.keras import layers as layers
from gpulayers.keras import mixed_precision as mixed_precision
from gpulayers.keras import models as models
from gpulayers.keras import utils as utils
from gpulayers.layers.input import Input as Input
from gpulayers.model import Model as Model
from gpulayers.model import Sequential as Sequential
from gpulayers.ops import activations as activations
