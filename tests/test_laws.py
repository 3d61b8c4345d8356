import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphlib import laws

LAWS = [laws.get(name, exponents) for name in ("chinchilla", "inference-aware") for exponents in laws.EXPONENTS]
positive = st.floats(0.05, 3.0)
variables = {"N": np.array([0.3, 1.0, 4.0]), "D": np.array([0.5, 1.0, 9.0]), "R": np.array([0.2, 1.0, 3.0])}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: f"{law.name}-{law.exponents}")
@given(values=st.lists(positive, min_size=7, max_size=7))
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
        scale = np.abs(law.predict(point, variables)).max() * 30  # bounds the third derivative over this box
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
    names = {(law.name, law.exponents): law.parameters for law in LAWS}
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


@pytest.mark.parametrize("call", [("kaplan",), ("chinchilla", "loose")])
def test_an_unknown_law_says_what_there_is(call):
    with pytest.raises(ValueError, match="choose one of"):
        laws.get(*call)
