r"""Scaling laws as data: a base, times a term for the shape, and which exponents are held equal.

A law predicts the loss, in nats per token, from the variables of a run:

======  =======================================================================
``N``   parameters, counted as the run table says
``D``   training tokens
``d``   width (d_model)
``L``   depth (n_layers)
``R``   aspect ratio d / L
``W``   width over the square root of the size, d / sqrt(N)
``M``   parameters of the feed-forward layers over those of the attention
======  =======================================================================

A **base** is linear in a constant and in the coefficients of powers of one variable, for example
Chinchilla's :math:`E + A N^{-\alpha} + B D^{-\beta}`. A **shape term** multiplies it. Given the
exponents and the parameters of the shape term, a law is linear in the rest; the fitter uses that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from morphlib.errors import InputError

Array = NDArray[np.float64]
Values = Mapping[str, Array]
Exponents = Literal["tied", "gamma", "free"]
EXPONENTS: tuple[Exponents, ...] = get_args(Exponents)


class Power(NamedTuple):
    """The summand ``coefficient / variable ** exponent``."""

    coefficient: str
    variable: str
    exponent: str


class Base(NamedTuple):
    """The irreducible loss E plus falling powers.

    ``tied`` maps an exponent to the one it equals unless each is free, ``fixed`` one that is no parameter to its value.
    """

    powers: tuple[Power, ...]
    tied: Mapping[str, str]
    fixed: Mapping[str, float]

    @property
    def coefficients(self) -> tuple[str, ...]:
        """The parameters that the base is linear in, the irreducible loss last."""
        return (*(power.coefficient for power in self.powers), "E")

    @property
    def exponents(self) -> tuple[str, ...]:
        return tuple(power.exponent for power in self.powers)


class ShapeTerm(NamedTuple):
    """A factor for the shape, one where the shape costs nothing; ``evaluate`` returns it and its derivatives by name.

    A parameter ``log_X0`` is the logarithm of the variable X at which the shape costs least.
    """

    parameters: tuple[str, ...]
    variables: tuple[str, ...]
    evaluate: Callable[[Values, Values], tuple[Array, dict[str, Array]]]


def _power(parameters: Values, variables: Values) -> tuple[Array, dict[str, Array]]:
    """1 + epsilon R^gamma."""
    ratio = variables["R"]
    raised = ratio ** parameters["gamma"]
    excess = parameters["epsilon"] * raised
    return 1 + excess, {"epsilon": raised, "gamma": np.log(ratio) * excess}


def _log_quadratic(parameters: Values, variables: Values) -> tuple[Array, dict[str, Array]]:
    """1 + epsilon (ln R - ln R0 - drift ln N)^2; without drift where the term has no such parameter."""
    log_n = np.log(variables["N"]) if "drift" in parameters else np.zeros(1)
    distance = np.log(variables["R"]) - parameters["log_R0"] - parameters.get("drift", 0.0) * log_n
    slope = -2 * parameters["epsilon"] * distance
    return 1 + parameters["epsilon"] * distance**2, {"epsilon": distance**2, "log_R0": slope, "drift": slope * log_n}


def _two_sided(parameters: Values, variables: Values) -> tuple[Array, dict[str, Array]]:
    """1 + epsilon (R / R0 + R0 / R - 2)."""
    ratio = variables["R"] * np.exp(-parameters["log_R0"])
    cost = ratio + 1 / ratio - 2
    return 1 + parameters["epsilon"] * cost, {"epsilon": cost, "log_R0": parameters["epsilon"] * (1 / ratio - ratio)}


def _conditional(parameters: Values, variables: Values) -> tuple[Array, dict[str, Array]]:
    """1 + epsilon (ln(W / W0) + W0 / W - 1), times one in M where the term has parameters for it."""
    value = np.ones(1)
    derivatives: dict[str, Array] = {}
    for x, epsilon in (("W", "epsilon"), ("M", "epsilon_M")):
        if epsilon in parameters:
            distance = np.log(variables[x]) - parameters[f"log_{x}0"]
            cost = distance + np.exp(-distance) - 1
            factor = 1 + parameters[epsilon] * cost
            derivatives = {name: derivative * factor for name, derivative in derivatives.items()}
            derivatives |= {epsilon: value * cost, f"log_{x}0": value * parameters[epsilon] * (np.exp(-distance) - 1)}
            value = value * factor
    return value, derivatives


_N, _D = Power("A", "N", "alpha"), Power("B", "D", "beta")
_WIDTH_DEPTH = (Power("A", "d", "a"), Power("C", "L", "c"), _D)

BASES: dict[str, Base] = {
    # E + A N^-alpha + B D^-beta, Hoffmann et al. 2022, section 3.3
    "chinchilla": Base((_N, _D), {"beta": "alpha"}, {}),
    # Gadre et al. 2024, equation 4: E + (a M^eta + b M^-eta) C^-eta with M = D / N and C = 6 N D, which is
    # E + a (C / M)^-eta + b (C M)^-eta, powers of N^2 and of D^2
    "over-training": Base((Power("a", "C/M", "eta"), Power("b", "CM", "eta")), {}, {}),
    # powers argued for in arXiv 2606.25008, here with fitted exponents
    "width-depth": Base(_WIDTH_DEPTH, {"c": "a"}, {}),
    "width-depth-fixed": Base(_WIDTH_DEPTH, {}, {"a": 1.0, "c": 1.0, "beta": 1 / 3}),
    # McLeish et al. 2025
    "gemstones": Base((_N, _D, Power("F", "d", "a"), Power("C", "L", "c")), {"beta": "alpha", "c": "a"}, {}),
}

SHAPE_TERMS: dict[str, ShapeTerm] = {
    "power": ShapeTerm(("epsilon", "gamma"), ("R",), _power),  # the paper, section 2
    "log-quadratic": ShapeTerm(("epsilon", "log_R0"), ("R",), _log_quadratic),  # this and the next two are ours
    "log-quadratic-drift": ShapeTerm(("epsilon", "log_R0", "drift"), ("R", "N"), _log_quadratic),
    "two-sided": ShapeTerm(("epsilon", "log_R0"), ("R",), _two_sided),
    # arXiv 2510.18245, with the scale of its a_0 + a_1 ln W + a_2 / W taken into the base
    "conditional": ShapeTerm(("epsilon", "log_W0"), ("W",), _conditional),
    "conditional-ratio": ShapeTerm(("epsilon", "log_W0", "epsilon_M", "log_M0"), ("W", "M"), _conditional),
}


@dataclass(frozen=True)
class Law:
    """A base times a shape term (or none), some of its exponents held equal (``ties``).

    ``ties`` maps an exponent to the one it equals, ``fixed`` an exponent or any other parameter to its value;
    only the others are parameters of the law.
    """

    name: str
    base: Base
    shape: ShapeTerm | None
    exponents: Exponents
    ties: Mapping[str, str]
    fixed: Mapping[str, float]

    @cached_property
    def linear(self) -> tuple[str, ...]:
        """The parameters that the law is linear in, given the others."""
        return tuple(name for name in self.base.coefficients if name not in self.fixed)

    @cached_property
    def nonlinear(self) -> tuple[str, ...]:
        """The exponents of the base that are free, then the free parameters of the shape term."""
        names = self.base.exponents + (self.shape.parameters if self.shape else ())
        return tuple(dict.fromkeys(name for name in names if name not in {*self.ties, *self.fixed}))

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of the free parameters, in the order of every array of parameters."""
        return self.linear + self.nonlinear

    @cached_property
    def variables(self) -> tuple[str, ...]:
        """The variables of a run that the law reads."""
        shape = self.shape.variables if self.shape else ()
        return tuple(dict.fromkeys((*(power.variable for power in self.base.powers), *shape)))

    @property
    def unscaled(self) -> set[str]:
        """The variables in whose units a fixed parameter may be given: those of its power or of its shape term."""
        names = {power.variable for power in self.base.powers if power.coefficient in self.fixed}
        if self.shape and self.fixed.keys() & set(self.shape.parameters):
            names |= set(self.shape.variables)
        return names

    def free_name(self, parameter: str) -> str:
        """The free parameter that stands for ``parameter``: itself, unless it is tied."""
        return self.ties.get(parameter, parameter)

    def holding(self, values: Mapping[str, float]) -> Law:
        """The law with some of its free parameters fixed."""
        return replace(self, fixed={**self.fixed, **values})

    def predict(self, values: ArrayLike, variables: Values) -> Array:
        """The loss in nats per token.

        ``values`` has shape (..., p), in the order of ``parameters``; each variable has shape (n,).
        Returns shape (..., n).
        """
        parameters = self.by_name(values, self.parameters)
        loss = parameters["E"]
        for power in self.base.powers:
            # c / x^e and not c x^-e, and E first, as in the authors' code: with the same rounding, their
            # numerically differentiated fits repeat to the last digit
            loss = loss + parameters[power.coefficient] / variables[power.variable] ** parameters[power.exponent]
        return loss if self.shape is None else loss * self.shape.evaluate(parameters, variables)[0]

    def basis(self, nonlinear_values: Array, variables: Values) -> tuple[list[Array], Array, Callable[[Array], list[Array]]]:
        """The columns that the linear parameters multiply, the rest of the loss, and its slopes by the nonlinear ones.

        For ``nonlinear_values`` of shape (..., m): one column for each of the k linear parameters, of a shape
        that broadcasts to (..., n). The rest is the terms of fixed coefficients. The slopes are a function of the
        linear parameters, (..., k), with one such array for each nonlinear parameter.
        """
        parameters = self.by_name(nonlinear_values, self.nonlinear)
        factor, by_parameter = self.shape.evaluate(parameters, variables) if self.shape else (np.ones(1), {})
        powers = {power.coefficient: variables[power.variable] ** -parameters[power.exponent] for power in self.base.powers}
        columns = {name: column * factor for name, column in (powers | {"E": np.ones(1)}).items()}
        rest = sum((value * columns[name] for name, value in self.fixed.items() if name in columns), np.zeros(1))

        def slopes(linear: Array) -> list[Array]:
            known = self.by_name(np.concatenate([linear, nonlinear_values], axis=-1), self.parameters)
            terms = {name: known[name] * column for name, column in powers.items()}
            base = sum(terms.values(), known["E"])
            result: dict[str, Array] = dict.fromkeys(self.nonlinear, np.zeros(1))

            def add(name: str, slope: Array) -> None:
                if (free := self.free_name(name)) in result:
                    result[free] = result[free] + slope

            for power in self.base.powers:
                add(power.exponent, -np.log(variables[power.variable]) * terms[power.coefficient] * factor)
            for name, derivative in by_parameter.items():
                add(name, base * derivative)
            return list(result.values())

        return [columns[name] for name in self.linear], rest, slopes

    def jacobian(self, values: ArrayLike, variables: Values) -> Array:
        """The derivative of the loss by each free parameter; shapes as in ``predict``, (..., n, p)."""
        values = np.asarray(values, dtype=float)
        linear, nonlinear = values[..., : len(self.linear)], values[..., len(self.linear) :]
        basis, _, slopes = self.basis(nonlinear, variables)
        batch = (*values.shape[:-1], len(variables[self.variables[0]]))
        return np.stack([np.broadcast_to(column, batch) for column in (*basis, *slopes(linear))], axis=-1)

    def to_raw(self, values: ArrayLike, units: Mapping[str, float]) -> Array:
        """Parameters for raw variables, from those for variables divided by ``units``; shape (..., p) both.

        c (x / u)^-e = (c u^e) x^-e for the base. For shape terms epsilon (R / u)^gamma = (epsilon u^-gamma) R^gamma, and
        ln(x / u) - (ln x0 - ln u) = ln x - ln x0, where a drift by ln(N / u) is one by ln N and a shift.
        """
        parameters = self.by_name(values, self.parameters)
        raw = dict(parameters)
        for power in self.base.powers:
            raw[power.coefficient] = parameters[power.coefficient] * units[power.variable] ** parameters[power.exponent]
        for name in self.shape.parameters if self.shape else ():
            if name.startswith("log_"):
                drift = parameters.get("drift", 0.0) * np.log(units.get("N", 1.0))
                raw[name] = parameters[name] + np.log(units[name[4]]) - drift
            elif name == "gamma":
                raw["epsilon"] = parameters["epsilon"] * units["R"] ** -parameters["gamma"]
        return np.concatenate([raw[name] for name in self.parameters], axis=-1)

    def by_name(self, values: ArrayLike, names: tuple[str, ...]) -> dict[str, Array]:
        """Values of shape (..., p) as a mapping, tied and fixed parameters included, each (..., 1) to broadcast over runs."""
        columns = np.moveaxis(np.asarray(values, dtype=float), -1, 0)[..., np.newaxis]
        free = dict(zip(names, columns, strict=True)) | {name: np.full(1, value) for name, value in self.fixed.items()}
        return free | {tied: free[name] for tied, name in self.ties.items()}


ALIASES = {"inference-aware": "chinchilla+power"}
NAMES = (*BASES, *ALIASES)


def get(name: str, exponents: Exponents = "tied") -> Law:
    """The law of that name: a base, ``BASE+SHAPE``, or ``inference-aware`` (the paper's, ``chinchilla+power``).

    ``exponents``: ``tied`` holds alpha = beta = gamma, as the paper fits (of a base of several shape
    exponents, those of width and depth are held equal); ``gamma`` frees only gamma, the authors'
    untied fit; ``free`` frees each. Raises ``InputError`` for any other name.
    """
    base_name, _, shape_name = ALIASES.get(name, name).partition("+")
    if base_name not in BASES or (shape_name and shape_name not in SHAPE_TERMS) or name.endswith("+"):
        raise InputError(
            f"{name!r} is not a law; choose one of {', '.join(NAMES)}, or BASE+SHAPE with SHAPE one of {', '.join(SHAPE_TERMS)}"
        )
    if exponents not in EXPONENTS:
        raise InputError(f"{exponents!r} does not say which exponents are free; choose one of {', '.join(EXPONENTS)}")
    base, shape = BASES[base_name], SHAPE_TERMS.get(shape_name)
    ties = {} if exponents == "free" else dict(base.tied)
    if exponents == "tied" and shape_name == "power" and "alpha" in base.exponents:
        ties["gamma"] = "alpha"
    shown = next((alias for alias, full in ALIASES.items() if full == f"{base_name}+{shape_name}"), name)
    return Law(shown, base, shape, exponents, ties, base.fixed)
