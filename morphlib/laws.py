r"""Scaling laws as data: a product of sums of powers, and which exponents are held equal.

A law predicts the loss, in nats per token, from the variables of a run: ``N`` parameters, ``D``
tokens, ``R`` = d_model / n_layers. Each factor of the product is a constant plus powers of one
variable, for example the two factors of the paper's law (section 2),

.. math:: L = (E + A N^{-\alpha} + B D^{-\beta}) (1 + \epsilon R^{\gamma}).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Exponents = Literal["tied", "gamma", "free"]
EXPONENTS: tuple[Exponents, ...] = get_args(Exponents)


@dataclass(frozen=True, slots=True)
class Power:
    """The summand ``coefficient * variable ** (sign * exponent)``."""

    coefficient: str
    variable: str
    exponent: str
    sign: Literal[-1, 1]


@dataclass(frozen=True, slots=True)
class Factor:
    """A constant, either a named parameter or a number, plus powers."""

    constant: str | float
    powers: tuple[Power, ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        constant = (self.constant,) if isinstance(self.constant, str) else ()
        coefficients = tuple(power.coefficient for power in self.powers)
        return coefficients + constant + tuple(power.exponent for power in self.powers)

    def value_and_derivatives(
        self, parameters: Mapping[str, Array], variables: Mapping[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        """The sum and its derivative with respect to each of its parameters, one value per run."""
        value: Array = np.asarray(parameters[self.constant] if isinstance(self.constant, str) else self.constant)
        derivatives = {self.constant: np.ones(1)} if isinstance(self.constant, str) else {}
        for power in self.powers:
            x = variables[power.variable]
            coefficient, raised = parameters[power.coefficient], x ** parameters[power.exponent]
            # c / x^e and not c x^-e, as in the authors' code: with the same rounding, their
            # numerically differentiated fits repeat to the last digit
            summand = coefficient * raised if power.sign > 0 else coefficient / raised
            value = value + summand
            # by the coefficient x^(s e), by the exponent s ln(x) c x^(s e)
            derivatives[power.coefficient] = raised if power.sign > 0 else 1 / raised
            derivatives[power.exponent] = power.sign * np.log(x) * summand
        return value, derivatives


@dataclass(frozen=True)
class Law:
    """A product of factors, some of whose exponents may be held equal (``ties``).

    ``ties`` maps an exponent to the one it equals; only the others are parameters of the law.
    """

    name: str
    factors: tuple[Factor, ...]
    exponents: Exponents
    ties: Mapping[str, str]
    formula: str

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of the free parameters, in the order of every array of parameters."""
        return tuple(name for factor in self.factors for name in factor.parameters if name not in self.ties)

    @property
    def powers(self) -> tuple[Power, ...]:
        return tuple(power for factor in self.factors for power in factor.powers)

    @property
    def variables(self) -> tuple[str, ...]:
        """The variables of a run that the law reads, in the order of the formula."""
        return tuple(dict.fromkeys(power.variable for power in self.powers))

    def free_name(self, parameter: str) -> str:
        """The free parameter that stands for ``parameter``: itself, unless it is tied."""
        return self.ties.get(parameter, parameter)

    def predict(self, values: ArrayLike, variables: Mapping[str, Array]) -> Array:
        """The loss in nats per token.

        ``values`` has shape (..., p), in the order of ``parameters``; each variable has shape (n,).
        Returns shape (..., n).
        """
        loss: Array = np.ones(1)
        for factor in self.factors:
            loss = loss * factor.value_and_derivatives(self._by_name(values), variables)[0]
        return loss

    def jacobian(self, values: ArrayLike, variables: Mapping[str, Array]) -> Array:
        """The derivative of the loss by each free parameter; shapes as in ``predict``, (..., n, p)."""
        evaluated = [factor.value_and_derivatives(self._by_name(values), variables) for factor in self.factors]
        columns: dict[str, Array] = {}
        for position, (_, derivatives) in enumerate(evaluated):
            others = [value for index, (value, _) in enumerate(evaluated) if index != position]
            for name, derivative in derivatives.items():
                # the product rule; a tied exponent adds its part to the parameter it equals
                part = derivative * np.prod(np.broadcast_arrays(*others), axis=0) if others else derivative
                columns[self.free_name(name)] = columns.get(self.free_name(name), 0.0) + part
        return np.stack(np.broadcast_arrays(*(columns[name] for name in self.parameters)), axis=-1)

    def _by_name(self, values: ArrayLike) -> dict[str, Array]:
        """Every parameter of the formula, tied ones included, shaped (..., 1) to broadcast over runs."""
        columns = np.moveaxis(np.asarray(values, dtype=float), -1, 0)[..., np.newaxis]
        free = dict(zip(self.parameters, columns, strict=True))
        return free | {tied: free[name] for tied, name in self.ties.items()}


CHINCHILLA = Factor("E", (Power("A", "N", "alpha", -1), Power("B", "D", "beta", -1)))
POWER_OF_ASPECT_RATIO = Factor(1.0, (Power("epsilon", "R", "gamma", 1),))

_FACTORS: dict[str, tuple[Factor, ...]] = {
    "chinchilla": (CHINCHILLA,),
    "inference-aware": (CHINCHILLA, POWER_OF_ASPECT_RATIO),
}
_ALIASES = {"chinchilla+power": "inference-aware"}
_FORMULAS = {
    "chinchilla": r"L = E + A N^{-\alpha} + B D^{-\beta}",
    "inference-aware": r"L = (E + A N^{-\alpha} + B D^{-\beta})(1 + \epsilon R^{\gamma})",
}
NAMES = tuple(_FACTORS) + tuple(_ALIASES)


def get(name: str, exponents: Exponents = "tied") -> Law:
    """The law ``chinchilla`` or ``inference-aware`` (also called ``chinchilla+power``).

    ``exponents``: ``tied`` holds alpha = beta = gamma, as the paper fits; ``gamma`` frees only
    gamma, the authors' untied fit; ``free`` frees each. Sources: Hoffmann et al. 2022, section
    3.3, and the paper, section 2. Raises ``ValueError`` for any other name.
    """
    name = _ALIASES.get(name, name)
    if name not in _FACTORS:
        raise ValueError(f"{name!r} is not a law; choose one of {', '.join(NAMES)}")
    if exponents not in EXPONENTS:
        raise ValueError(f"{exponents!r} does not say which exponents are free; choose one of {', '.join(EXPONENTS)}")
    factors = _FACTORS[name]
    equal = {"tied": ("beta", "gamma"), "gamma": ("beta",), "free": ()}[exponents]
    used = {power.exponent for factor in factors for power in factor.powers}
    ties = {exponent: "alpha" for exponent in equal if exponent in used}
    return Law(name, factors, exponents, ties, _FORMULAS[name])
