"""Functions that CuPy 14.2 shares with NumPy, with the names of their parameters.

``ufunc`` stands for ``out``, ``dtype`` and ``casting``; a name without brackets is a constant, a class, or a function
that does not tell. test_strict_array.py compares the list with an installed CuPy.
"""

from __future__ import annotations

_LIST = """
abs(ufunc) absolute(ufunc) acos(ufunc) acosh(ufunc) add(ufunc) all(a,axis,out,keepdims)
allclose(a,b,rtol,atol,equal_nan) amax(a,axis,out,keepdims) amin(a,axis,out,keepdims) angle(z,deg)
any(a,axis,out,keepdims) append(arr,values,axis) apply_along_axis apply_over_axes(func,a,axes)
arange(start,stop,step,dtype) arccos(ufunc) arccosh(ufunc) arcsin(ufunc) arcsinh(ufunc) arctan(ufunc) arctan2(ufunc)
arctanh(ufunc) argmax(a,axis,dtype,out,keepdims) argmin(a,axis,dtype,out,keepdims) argpartition(a,kth,axis)
argsort(a,axis,kind) argwhere(a) around(a,decimals,out) array(obj,dtype,copy,order,subok,ndmin,blocking) array2string
array_equal(a1,a2,equal_nan) array_equiv(a1,a2) array_repr(arr,max_line_width,precision,suppress_small)
array_split(ary,indices_or_sections,axis) array_str(arr,max_line_width,precision,suppress_small)
asanyarray(a,dtype,order,copy,blocking) asarray(a,dtype,order,copy,blocking) asarray_chkfinite(a,dtype,order)
ascontiguousarray(a,dtype) asfortranarray(a,dtype) asin(ufunc) asinh(ufunc) astype(x,dtype,copy) atan(ufunc)
atan2(ufunc) atanh(ufunc) atleast_1d() atleast_2d() atleast_3d() average(a,axis,weights,returned,keepdims) bartlett(M)
base_repr(number,base,padding) binary_repr(num,width) bincount(x,weights,minlength) bitwise_and(ufunc)
bitwise_count(ufunc) bitwise_invert(ufunc) bitwise_left_shift(ufunc) bitwise_not(ufunc) bitwise_or(ufunc)
bitwise_right_shift(ufunc) bitwise_xor(ufunc) blackman(M) bool bool_ broadcast broadcast_arrays() broadcast_shapes()
broadcast_to(array,shape) byte c_ can_cast(from_,to,casting) cbrt(ufunc) cdouble ceil(ufunc)
choose(a,choices,out,mode) clip(a,a_min,a_max,out) column_stack(tup) common_type() complex128 complex64
complexfloating compress(condition,a,axis,out) concat(tup,axis,out,dtype,casting)
concatenate(tup,axis,out,dtype,casting) conj(ufunc) conjugate(ufunc) convolve(a,v,mode) copy(a,order) copysign(ufunc)
copyto(dst,src,casting,where) corrcoef(a,y,rowvar,bias,ddof,dtype) correlate(a,v,mode) cos(ufunc) cosh(ufunc)
count_nonzero(a,axis) cov(a,y,rowvar,bias,ddof,fweights,aweights,dtype) cross(a,b,axisa,axisb,axisc,axis) csingle
cumprod(a,axis,dtype,out) cumsum(a,axis,dtype,out) cumulative_prod(x,axis,dtype,out,include_initial)
cumulative_sum(x,axis,dtype,out,include_initial) deg2rad(ufunc) degrees(ufunc) delete(arr,indices,axis) diag(v,k)
diag_indices(n,ndim) diag_indices_from(arr) diagflat(v,k) diagonal(a,offset,axis1,axis2) diff(a,n,axis,prepend,append)
digitize(x,bins,right) divide(ufunc) divmod(ufunc) dot(a,b,out) double dsplit(ary,indices_or_sections) dstack(tup)
dtype e ediff1d(arr,to_end,to_begin) einsum empty(shape,dtype,order) empty_like(prototype,dtype,order,subok,shape)
equal(ufunc) euler_gamma exp(ufunc) exp2(ufunc) expand_dims(a,axis) expm1(ufunc) extract(condition,a)
eye(N,M,k,dtype,order) fabs(ufunc) fill_diagonal(a,val,wrap) finfo fix(ufunc) flatiter flatnonzero(a) flip(a,axis)
fliplr(a) flipud(a) float16 float32 float64 float_power(ufunc) floating floor(ufunc) floor_divide(ufunc) fmax(ufunc)
fmin(ufunc) fmod(ufunc) format_float_positional format_float_scientific frexp(ufunc) from_dlpack frombuffer fromfile
fromfunction fromiter fromstring full(shape,fill_value,dtype,order) full_like(a,fill_value,dtype,order,subok,shape)
gcd(ufunc) generic genfromtxt get_printoptions() gradient(f,axis,edge_order) greater(ufunc) greater_equal(ufunc) half
hamming(M) hanning(M) heaviside(ufunc) histogram(x,bins,range,density,weights)
histogram2d(x,y,bins,range,weights,density) histogramdd(sample,bins,range,weights,density)
hsplit(ary,indices_or_sections) hstack(tup,dtype,casting) hypot(ufunc) i0(ufunc) identity(n,dtype) iinfo imag(val)
index_exp indices(dimensions,dtype) inexact inf inner(a,b) int16 int32 int64 int8 int_ intc integer
interp(x,xp,fp,left,right,period) intersect1d(arr1,arr2,assume_unique,return_indices) intp invert(ufunc)
isclose(a,b,rtol,atol,equal_nan) iscomplex(x) iscomplexobj(x) isdtype(dtype,kind) isfinite(ufunc) isfortran(a)
isin(element,test_elements,assume_unique,invert) isinf(ufunc) isnan(ufunc) isneginf(x,out) isposinf(x,out) isreal(x)
isrealobj(x) isscalar(element) issubdtype(arg1,arg2) iterable(y) ix_() kaiser(M,beta) kron(a,b) lcm(ufunc)
ldexp(ufunc) left_shift(ufunc) less(ufunc) less_equal(ufunc) lexsort(keys)
linspace(start,stop,num,endpoint,retstep,dtype,axis) load(file,mmap_mode,allow_pickle) loadtxt log(ufunc) log10(ufunc)
log1p(ufunc) log2(ufunc) logaddexp(ufunc) logaddexp2(ufunc) logical_and(ufunc) logical_not(ufunc) logical_or(ufunc)
logical_xor(ufunc) logspace(start,stop,num,endpoint,base,dtype,axis) long longlong mask_indices(n,mask_func,k)
matmul(axes,axis,keepdims,casting,dtype,signature,order,out) matrix_transpose(x) max(a,axis,out,keepdims)
maximum(ufunc) may_share_memory(a,b,max_work) mean(a,axis,dtype,out,keepdims)
median(a,axis,out,overwrite_input,keepdims) meshgrid mgrid min(a,axis,out,keepdims) min_scalar_type minimum(ufunc)
mintypecode(typechars,typeset,default) mod(ufunc) modf(ufunc) moveaxis(a,source,destination) multiply(ufunc) nan
nan_to_num(x,copy,nan,posinf,neginf) nanargmax(a,axis,dtype,out,keepdims) nanargmin(a,axis,dtype,out,keepdims)
nancumprod(a,axis,dtype,out) nancumsum(a,axis,dtype,out) nanmax(a,axis,out,keepdims)
nanmean(a,axis,dtype,out,keepdims) nanmedian(a,axis,out,overwrite_input,keepdims) nanmin(a,axis,out,keepdims)
nanprod(a,axis,dtype,out,keepdims) nanstd(a,axis,dtype,out,ddof,keepdims) nansum(a,axis,dtype,out,keepdims)
nanvar(a,axis,dtype,out,ddof,keepdims) ndarray ndim(a) ndindex negative(ufunc) newaxis nextafter(ufunc) nonzero(a)
not_equal(ufunc) number ogrid ones(shape,dtype,order) ones_like(a,dtype,order,subok,shape) outer(a,b,out)
packbits(a,axis,bitorder) pad partition(a,kth,axis)
percentile(a,q,axis,out,overwrite_input,method,keepdims,interpolation) permute_dims(a,axes) pi
piecewise(x,condlist,funclist) place(arr,mask,vals) poly(seq_of_zeros) poly1d polyadd(a1,a2)
polyfit(x,y,deg,rcond,full,w,cov) polymul(a1,a2) polysub(a1,a2) polyval(p,x) positive(ufunc) pow(ufunc) power(ufunc)
printoptions prod(a,axis,dtype,out,keepdims) promote_types(type1,type2) ptp(a,axis,out,keepdims) put(a,ind,v,mode)
put_along_axis(arr,indices,values,axis) putmask(a,mask,values)
quantile(a,q,axis,out,overwrite_input,method,keepdims,interpolation) r_ rad2deg(ufunc) radians(ufunc) ravel(a,order)
ravel_multi_index(multi_index,dims,mode,order) real(val) real_if_close(a,tol) reciprocal(ufunc) remainder(ufunc)
repeat(a,repeats,axis) require(a,dtype,requirements) reshape(a,newshape,order,copy) resize(a,new_shape) result_type()
right_shift(ufunc) rint(ufunc) roll(a,shift,axis) rollaxis(a,axis,start) roots(p) rot90(a,k,axes)
round(a,decimals,out) row_stack(tup,dtype,casting) s_ save(file,arr,allow_pickle) savetxt savez savez_compressed
searchsorted(a,v,side,sorter) select(condlist,choicelist,default)
set_printoptions(precision,threshold,edgeitems,linewidth,suppress,nanstr,infstr,formatter,sign,floatmode,legacy,override_repr)
setdiff1d(ar1,ar2,assume_unique) setxor1d(ar1,ar2,assume_unique) shape(a) shares_memory(a,b,max_work) short
show_config(_full) sign(ufunc) signbit(ufunc) signedinteger sin(ufunc) sinc(ufunc) single sinh(ufunc) size
sort(a,axis,kind) sort_complex(a) split(ary,indices_or_sections,axis) sqrt(ufunc) square(ufunc) squeeze(a,axis)
stack(tup,axis,out,dtype,casting) std(a,axis,dtype,out,ddof,keepdims) subtract(ufunc) sum(a,axis,dtype,out,keepdims)
swapaxes(a,axis1,axis2) take(a,indices,axis,out) take_along_axis(a,indices,axis) tan(ufunc) tanh(ufunc)
tensordot(a,b,axes) tile(A,reps) trace(a,offset,axis1,axis2,dtype,out) transpose(a,axes) trapezoid(y,x,dx,axis)
tri(N,M,k,dtype) tril(m,k) tril_indices(n,k,m) tril_indices_from(arr,k) trim_zeros(filt,trim) triu(m,k)
triu_indices(n,k,m) triu_indices_from(arr,k) true_divide(ufunc) trunc(ufunc) typename(char) ubyte ufunc uint uint16
uint32 uint64 uint8 uintc uintp ulong ulonglong union1d(arr1,arr2)
unique(ar,return_index,return_inverse,return_counts,axis,equal_nan) unique_all(x) unique_counts(x) unique_inverse(x)
unique_values(x) unpackbits(a,axis,bitorder) unravel_index(indices,dims,order) unsignedinteger
unwrap(p,discont,axis,period) ushort vander(x,N,increasing) var(a,axis,dtype,out,ddof,keepdims) vdot(a,b) vectorize
vsplit(ary,indices_or_sections) vstack(tup,dtype,casting) where(condition,x,y) zeros(shape,dtype,order)
zeros_like(a,dtype,order,subok,shape)
"""

_UFUNC = frozenset({"out", "dtype", "casting"})


def _parsed() -> dict[str, frozenset[str] | None]:
    found: dict[str, frozenset[str] | None] = {}
    for entry in _LIST.split():
        name, bracket, parameters = entry.partition("(")
        names = frozenset(parameters.rstrip(")").split(","))
        found[name] = (_UFUNC if names == {"ufunc"} else names) if bracket else None
    return found


# Name -> what may be given by keyword, or None where that is not known.
NAMES = _parsed()
