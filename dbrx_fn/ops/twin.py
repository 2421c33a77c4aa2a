"""`with_kernel` joins stock MLX operations, which run everywhere, to a kernel for some machines.

The decorated function holds the stock operations. If a kernel fits the arguments, the kernel computes the values.
Gradients are those of the stock operations, since MLX has none for custom kernels.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

P = ParamSpec("P")
R = TypeVar("R")


def with_kernel(
    kernel: Callable[P, R], *, fits: Callable[P, bool], gradients: bool = True
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates stock operations with a kernel that computes the same.

    Args:
        kernel: takes the same arguments as the stock operations.
        fits: whether the kernel can take these arguments on this machine.
        gradients: if true, the kernel has the stock operations' gradients, by each argument that is an array of floats
            or a dict of such arrays. If false, MLX raises when a gradient is asked for, unless the kernel has its own.
    """

    def decorate(stock: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(stock)
        def call(*args: P.args, **static: P.kwargs) -> R:
            if not fits(*args, **static):
                return stock(*args, **static)
            if not gradients:
                return kernel(*args, **static)
            return cast(R, _with_gradients_of(stock, kernel, args, static))

        return call

    return decorate


def _with_gradients_of(
    stock: Callable[..., Any], kernel: Callable[..., Any], args: tuple[Any, ...], static: dict[str, Any]
) -> mx.array:
    places = [place for place, arg in enumerate(args) if _has_gradient(arg)]

    def by_primals(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*primals: Any) -> Any:
            filled = list(args)
            for place, primal in zip(places, primals, strict=True):
                filled[place] = primal
            return function(*filled, **static)

        return call

    function = mx.custom_function(by_primals(kernel))

    def vjp(given: Any, cotangent: mx.array, output: mx.array) -> Any:
        # MLX passes a single primal bare, and several as a tuple.
        primals = [given] if len(places) == 1 else list(given)
        flat: dict[str, mx.array] = dict(tree_flatten(primals))

        def of_leaves(*leaves: mx.array) -> list[mx.array]:
            return [by_primals(stock)(*tree_unflatten(list(zip(flat, leaves, strict=True))))]

        _, grads = mx.vjp(of_leaves, list(flat.values()), [cotangent])
        nested = tree_unflatten(list(zip(flat, grads, strict=True)))
        return nested[0] if len(places) == 1 else tuple(nested)

    function.vjp(vjp)
    return cast(mx.array, function(*(args[place] for place in places)))


def _has_gradient(arg: Any) -> bool:
    if isinstance(arg, dict):
        return all(map(_has_gradient, arg.values()))
    return isinstance(arg, mx.array) and mx.issubdtype(arg.dtype, mx.floating)
