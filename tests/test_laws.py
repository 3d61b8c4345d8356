import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from morphlib import laws
from morphlib.errors import InputError

PAPER = [laws.get(name, exponents) for name in ("chinchilla", "inference-aware") for exponents in laws.EXPONENTS]
LAWS = PAPER + [
    laws.get(f"{base}+{shape}" if shape else base, exponents)
    for base in laws.BASES
    for shape in ("", *laws.SHAPE_TERMS)
    for exponents in ("tied", "free")
    if f"{base}+{shape}" not in ("chinchilla+", "chinchilla+power")
]
positive = st.floats(0.05, 3.0)
variables = {
    name: np.array([0.3, 1.0, 4.0]) ** power
    for name, power in zip(
        ("N", "D", "R", "d", "L", "W", "M", "C/M", "CM"), (1, 0.8, -1, 0.5, -0.7, 0.3, 0.9, 1.2, 0.6), strict=True
    )
}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: f"{law.name}-{law.exponents}")
@settings(max_examples=20)
@given(values=st.lists(positive, min_size=13, max_size=13))
def test_derivatives_agree_with_central_differences(law, values):
    """With step h the central difference errs by h^2 f'''/6 + eps f/h; h = 1e-5 leaves about 1e-9 of the scale."""
    point = np.array(values[: len(law.parameters)])
    step = 1e-5
    jacobian = law.jacobian(point, variables)
    assert jacobian.shape == (3, len(point))
    for index in range(len(point)):
        offset = np.zeros(len(point))
        offset[index] = step
        numeric = (law.predict(point + offset, variables) - law.predict(point - offset, variables)) / (2 * step)
        scale = np.abs(jacobian).max() * 100  # bounds the third derivative over this box
        assert np.allclose(jacobian[:, index], numeric, rtol=1e-6, atol=1e-9 * scale)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: f"{law.name}-{law.exponents}")
def test_many_parameter_sets_at_once_are_the_same_as_one_by_one(law):
    sets = np.random.default_rng(0).uniform(0.1, 1.0, size=(4, 5, len(law.parameters)))
    together = law.predict(sets, variables)
    jacobians = law.jacobian(sets, variables)
    assert together.shape == (4, 5, 3)
    assert jacobians.shape == (4, 5, 3, len(law.parameters))
    for position in np.ndindex(4, 5):
        assert np.array_equal(together[position], law.predict(sets[position], variables))
        assert np.array_equal(jacobians[position], law.jacobian(sets[position], variables))


def test_free_parameters_are_those_of_the_paper():
    names = {(law.name, law.exponents): law.parameters for law in PAPER}
    assert names["chinchilla", "tied"] == names["chinchilla", "gamma"] == ("A", "B", "E", "alpha")
    assert names["chinchilla", "free"] == ("A", "B", "E", "alpha", "beta")
    assert names["inference-aware", "tied"] == ("A", "B", "E", "alpha", "epsilon")
    assert names["inference-aware", "gamma"] == ("A", "B", "E", "alpha", "epsilon", "gamma")
    assert names["inference-aware", "free"] == ("A", "B", "E", "alpha", "beta", "epsilon", "gamma")


def test_the_formula_as_written():
    n, d, r = 7.9e7, 1.6e9, 64.0
    a, b, e, alpha, beta, epsilon, gamma = 750.0, 6.6e6, 2.3, 0.36, 0.72, 2.3e-5, 1.26
    law = laws.get("chinchilla+power", "free")
    predicted = law.predict(
        [a, b, e, alpha, beta, epsilon, gamma], {"N": np.array([n]), "D": np.array([d]), "R": np.array([r])}
    )
    assert predicted == pytest.approx((e + a / n**alpha + b / d**beta) * (1 + epsilon * r**gamma), rel=1e-14)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: f"{law.name}-{law.exponents}")
@given(seed=st.integers(0, 10_000))
@settings(max_examples=10)
def test_the_basis_and_other_units_give_the_same_losses(law, seed):
    rng = np.random.default_rng(seed)
    values = rng.uniform(0.1, 1.5, len(law.parameters))
    basis, _, _ = law.basis(values[len(law.linear) :], variables)
    loss = law.predict(values, variables)
    columns = np.stack(np.broadcast_arrays(*basis, variables["N"])[:-1], axis=-1)
    assert np.allclose(columns @ values[: len(law.linear)], loss, rtol=1e-13)
    units = {name: float(np.exp(rng.normal(0, 3))) for name in variables}
    scaled = {name: column / units[name] for name, column in variables.items()}
    # a factor u^e of up to e^(3 x 1.5) leaves the rounding of a dozen operations
    assert np.allclose(law.predict(law.to_raw(values, units), variables), law.predict(values, scaled), rtol=1e-11)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: f"{law.name}-{law.exponents}")
def test_a_law_that_holds_a_parameter_is_the_law_there(law):
    values = np.random.default_rng(0).uniform(0.1, 1.5, len(law.parameters))
    loss, jacobian = law.predict(values, variables), law.jacobian(values, variables)
    for index, name in enumerate(law.parameters):
        held, others = law.holding({name: values[index]}), np.delete(values, index)
        assert name not in held.parameters and len(held.parameters) == len(others)
        # the same sums and products, in the same order up to the place of the held term
        assert np.allclose(held.predict(others, variables), loss, rtol=1e-14)
        assert np.allclose(held.jacobian(others, variables), np.delete(jacobian, index, axis=1), rtol=1e-13)
        basis, rest, _ = held.basis(others[len(held.linear) :], variables)
        columns = np.stack(np.broadcast_arrays(*basis, variables["N"])[:-1], axis=-1)
        assert np.allclose(columns @ others[: len(held.linear)] + rest, loss, rtol=1e-13)


def test_gadres_law_is_chinchillas_with_tied_exponents():
    """E + (a M^eta + b M^-eta) C^-eta with C = 6 N D, M = D / N, computed as Gadre et al. write it."""
    n, d = np.array([1e8, 1e9]), np.array([2e9, 1e11])
    a, b, e, eta = 12000.0, 107000.0, 2.1, 0.247
    ratio, compute = d / n, 6 * n * d
    written = e + (a * ratio**eta + b * ratio**-eta) * compute**-eta
    law = laws.get("over-training")
    assert law.predict([a, b, e, eta], {"C/M": compute / ratio, "CM": compute * ratio}) == pytest.approx(written, rel=1e-13)


def test_shape_terms_are_one_at_their_best_and_never_below():
    for name, term in laws.SHAPE_TERMS.items():
        if name == "power":
            continue
        at = {parameter: np.array([0.3]) for parameter in term.parameters} | {"drift": np.array([0.0])}
        at = {parameter: value for parameter, value in at.items() if parameter in term.parameters}
        ratios = np.exp(0.3 + np.linspace(-2, 2, 41))
        value, _ = term.evaluate(at, dict.fromkeys(("R", "W", "M", "N"), ratios))
        assert value.min() == pytest.approx(1) and value.argmin() == 20


@pytest.mark.parametrize("call", [("kaplan",), ("chinchilla", "loose")])
def test_an_unknown_law_says_what_there_is(call):
    with pytest.raises(ValueError, match="choose one of"):
        laws.get(*call)


@pytest.mark.parametrize(
    ("name", "tied", "free"),
    [
        ("over-training", "a b E eta", "a b E eta"),
        ("width-depth", "A C B E a beta", "A C B E a c beta"),
        ("width-depth-fixed", "A C B E", "A C B E"),
        ("gemstones", "A B F C E alpha a", "A B F C E alpha beta a c"),
        ("gemstones+power", "A B F C E alpha a epsilon", "A B F C E alpha beta a c epsilon gamma"),
        ("width-depth+power", "A C B E a beta epsilon gamma", "A C B E a c beta epsilon gamma"),
        ("chinchilla+conditional-ratio", "A B E alpha epsilon log_W0 epsilon_M log_M0",
         "A B E alpha beta epsilon log_W0 epsilon_M log_M0"),
    ],
)  # fmt: skip
def test_free_parameters_of_each_base(name, tied, free):
    assert (laws.get(name).parameters, laws.get(name, "free").parameters) == (tuple(tied.split()), tuple(free.split()))


def test_names_of_laws():
    assert laws.get("chinchilla+power").name == "inference-aware" == laws.get("inference-aware").name
    with pytest.raises(InputError, match="'chinchilla\\+' is not a law"):
        laws.get("chinchilla+")


def test_variables_that_a_held_parameter_reads_keep_their_units():
    law = laws.get("chinchilla+log-quadratic-drift", "free")
    assert law.unscaled == set() and law.holding({"alpha": 0.3, "E": 1.0}).unscaled == set()
    assert law.holding({"B": 1.0}).unscaled == {"D"}
    assert law.holding({"log_R0": 1.0}).unscaled == {"R", "N"}
