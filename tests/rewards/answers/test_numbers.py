"""Numbers, units and equations: values that math-verify rounds, drops or misreads."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdrl_lightning.rewards import MathReward, Sample
from kdrl_lightning.rewards.answers.numbers import read_number, same_number
from kdrl_lightning.rewards.answers.units import same_quantity

# reference | answer | right
CASES = r"""
1.6e-19 | 9.1e-31 | 0
1.6\times 10^{-19} | 1.6e-19 | 1
1.6 \cdot 10^{-19} | 1.7 \cdot 10^{-19} | 0
0.0000001 | 0.0000002 | 0
1e-7 | 0.0000001 | 1
0 | 1e-400 | 0
10^{-100} | 10^{-101} | 0
10^{6} | 1{,}000{,}000 | 1
10^{12} | 10^12 | 1
1.6\times10^{-19} | 1.6 \times 10^-19 | 1
1e30 | 1000000000000000000000000000000 | 1
1e30 | 1.0000001e30 | 0
6.022e23 | 6.022\times10^{23} | 1
299792458 | 2.99792458e8 | 1
123456789012345678901234567890 | 123456789012345678901234567891 | 0
0.3 | 0.30000000000000004 | 1
0.6666666666666666 | 2/3 | 1
0.30000000001 | 0.3 | 0
0.30000000000004 | 0.3 | 0
1.23456789 | 1.23456788 | 0
2 | 1.9999999999 | 0
2.50 | 2.5 | 1
0 | -0.0 | 1
-1/2 | 1/2 | 0
−3 | -3 | 1
5 | 5\% | 0
5\% | 5 | 0
5\% | 0.05 | 1
0.05 | 5\% | 1
150\% | 3/2 | 1
12.5\% | 1/8 | 1
100 | 100\% | 0
2\sqrt{2} | 2\sqrt{2}\% | 0
1/3 | 0.333333 | 1
1/3 | 0.33333 | 0
1000000/3 | 333333 | 0
\sqrt{2} | 1.4142136 | 1
\sqrt{2} | 1.414 | 0
\sqrt{2}\times 10^{-9} | \sqrt{3}\times 10^{-9} | 0
(10^{-9}, 2) | (10^{-10}, 2) | 0
(10^{-9}, 2) | (10^{-9}, 2) | 1
10^{-9}x | 10^{-10}x | 0
(0.000000001, 2) | (0.0000000002, 2) | 0
(0.000000001, 2) | (1e-9, 2) | 1
1.6\times10^{-19}\text{ C} | 9\times10^{-31}\text{ C} | 0
1.6\times10^{-19}\text{ C} | 1.6\times10^{-19} | 1
1.6\times10^{-19} | 9\times10^{-31}\text{ J} | 0
\{0.0000003, 1\} | \{1, 0.0000003\} | 1
[0, 0.0000003] | [0, 0.0000004] | 0
0.577350 | \frac{1}{\sqrt{3}} | 1
x^2+2x+1 | (x+1)^2 | 1
1,234.5 | 1234.5 | 1
1 000 | 1000 | 1
1\,000 | 1000 | 1
1,2 | 1.2 | 0
\$5 | 5 | 1
3 | x=5 \text{ or } x=3 | 0
3 | x=5 and x=3 | 0
5 | x=y=5 | 1
5 | 3=5 | 0
5 | x=3=5 | 0
7 | 7=8 | 0
7 | 8=7 | 0
x=5 | 3=5 | 0
5 | x=5 | 1
5 | 5=x | 1
5 | 2+3=5 | 1
6 | 2+3=5 | 0
5 | f(2)=5 | 1
\frac12 | x=0.5 | 1
2x+1 | y=2x+1 | 1
\sqrt{8} | x = 2\sqrt{2} = \sqrt{8} | 1
\sqrt{8} | 3 = \sqrt{8} | 0
0.25 | P(X=1)=0.25 | 1
x=1,y=2 | x=2,y=1 | 0
x<5 | x\leq 5 | 0
5 | x\leq 5 | 0
5\text{ cm} | 5\text{ m} | 0
5\text{ cm} | 50\text{ mm} | 1
5\text{ cm} | 5 | 1
5 | 5\text{ cm} | 1
5\text{ cm} | 5\text{ centimeters} | 1
5000 | 5,000 dollars | 1
5\text{ m/s} | 5\text{ km/h} | 0
5\text{ m/s} | 18\text{ km/h} | 1
5\text{ m/s} | 5\text{ m} | 0
1.50\text{ dollars} | 150\text{ cents} | 1
1/3 | 0.\overline{3} | 1
7/22 | 0.3\overline{18} | 1
1/3 | 0.\overline{4} | 0
x > 0.0000001 | x > 0.0000002 | 0
\begin{pmatrix}0.0000001\\1\end{pmatrix} | \begin{pmatrix}0\\1\end{pmatrix} | 0
2^{31}-1 | 2147483648 | 0
5 kg | 5 g | 0
5 kg | 5 m | 0
90\text{ minutes} | 1.5\text{ hours} | 1
3\text{ m}^2 | 30000\text{ cm}^2 | 1
3\text{ m}^2 | 3\text{ m}^3 | 0
2\sqrt{2}\text{ cm} | 2\sqrt{2}\text{ m} | 0
2\sqrt{2}\text{ cm} | \sqrt{8}\text{ cm} | 1
[1,2) | (1,2] | 0
(-\infty,3) | (-\infty,3) | 1
(-\infty,3) | (\infty,3) | 0
\infty | -\infty | 0
1/0 | 2/0 | 0
5 | nan | 0
9e99999 | 9e99998 | 0
1 1/2 | 3/2 | 1
1 1/2 | 11/2 | 0
90 | 90° | 1
90 | 91° | 0
7 | \mathbf{7} | 1
0.5 | \textbf{1/2} | 1
7 | \mathbf{8} | 0
x² | x^2 | 1
√2 | \sqrt{2} | 1
√(x+1) | \sqrt{1+x} | 1
√3 | \sqrt{2} | 0
5×10^3 | 5000 | 1
2·3 | 6 | 1
"""
ROWS = [tuple(part.strip() for part in line.split(" | ")) for line in CASES.strip().splitlines()]


@pytest.mark.parametrize(("gold", "answer", "right"), ROWS)
def test_values(math_reward: MathReward, gold: str, answer: str, right: str) -> None:
    (result,) = math_reward.judge([Sample(f"\\boxed{{{answer}}}", [], {"answer": gold})])
    assert result == float(right)


@given(st.fractions(), st.fractions())
def test_fractions_are_compared_exactly(one: Fraction, other: Fraction) -> None:
    texts = [rf"\frac{{{f.numerator}}}{{{f.denominator}}}" for f in (one, other)]
    assert same_number(*texts) == (one == other)
    assert same_number(str(one), texts[0]) is True


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-1e20, max_value=1e20))
def test_decimals_are_read_exactly(value: object) -> None:
    read = read_number(str(value))
    assert read is None or read.value == Fraction(str(value))
    assert read is not None or "E-" in str(value)


@pytest.mark.parametrize(
    "text", ["", "-", ".", "x", "1/0", "--5", "1,2", "1.2.3", "9e9999", "½", "1" * 2000]
)
def test_what_is_no_number(text: str) -> None:
    assert read_number(text) is None


def test_quantities_need_two_units() -> None:
    assert same_quantity("5 cm", "x") is None and same_quantity("5 parsecs", "5 cm") is None
    assert same_quantity(r"x\text{ cm}", r"y\text{ cm}") is None  # math-verify decides
