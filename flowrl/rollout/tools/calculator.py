"""A calculator: arithmetic as Python writes it, computed from its syntax tree; nothing is executed.

Numbers stay within `MOST_BITS`, so that no expression of `MOST_CHARACTERS` can take long.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

MOST_CHARACTERS = 512
MOST_BITS = 4096
MOST_DEPTH = 64

Number = int | float


def calculate(expression: str) -> str:
    """The value of `expression`. Raises ValueError for what is no arithmetic, or too large."""
    if not isinstance(expression, str) or len(expression) > MOST_CHARACTERS:
        raise ValueError(f"expression: must be a string of at most {MOST_CHARACTERS} characters")
    try:
        tree = ast.parse(expression.strip().replace("^", "**"), mode="eval")
        return _shown(_value(tree.body, 0))
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"not arithmetic: {expression!r}") from error
    except ZeroDivisionError as error:
        raise ValueError("division by zero") from error
    except OverflowError as error:
        raise ValueError("the number is too large") from error


def _value(node: ast.expr, depth: int) -> Number:
    if depth > MOST_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left, depth + 1), _value(node.right, depth + 1)
        return _bounded(_BINARY[type(node.op)](left, right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand, depth + 1))
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
        if node.keywords or any(isinstance(argument, ast.Starred) for argument in node.args):
            raise ValueError(f"{node.func.id}: takes plain arguments only")
        arguments = [_value(argument, depth + 1) for argument in node.args]
        try:
            return _bounded(_FUNCTIONS[node.func.id](*arguments))
        except TypeError as error:
            raise ValueError(f"{node.func.id}: {error}") from error
    raise ValueError(f"not arithmetic: {ast.unparse(node)}")


def _bounded(value: Any) -> Number:
    if isinstance(value, complex) or not isinstance(value, int | float):
        raise ValueError("the result is no real number")
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise OverflowError
    if isinstance(value, float) and not math.isfinite(value):
        raise OverflowError
    return value


def _power(base: Number, exponent: Number) -> Any:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > 2 * MOST_BITS:
        raise OverflowError
    return base**exponent


def _round(number: Number, digits: Number = 0) -> Number:
    if not isinstance(digits, int) or abs(digits) > 100:
        raise ValueError("round: digits must be a whole number within 100")
    return round(number, digits) if digits else round(number)


def _shown(value: Number) -> str:
    if isinstance(value, int):
        return str(value)
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.12g}"


_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_CONSTANTS = {"pi": math.pi, "e": math.e}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "min": min,
    "max": max,
    "round": _round,
    **{name: getattr(math, name) for name in ("sqrt", "floor", "ceil", "exp", "log", "log2", "log10", "gcd")},
    **{name: getattr(math, name) for name in ("sin", "cos", "tan", "asin", "acos", "atan", "degrees", "radians")},
}
