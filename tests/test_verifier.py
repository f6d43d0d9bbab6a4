"""The verifier: what is the same is right, what is not is wrong, and nothing costs much.

The truths are hand-made pairs, trees that the tests evaluate themselves with Fractions and mpmath,
and, where ../shared is at hand, labelled answers and every gold answer of MATH and GSM8K.
"""

import ast
import contextlib
import gc
import itertools
import json
import random
import re
import threading
import time
from fractions import Fraction
from pathlib import Path

import mpmath
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval_math import main, verify
from run.compare import compare, mcnemar, paired_difference
from system.errors import UserError
from verifier.compare import same_answer
from verifier.extract import extract_answer, last_boxed
from verifier.latex import parse
from verifier.spellings import MACROS, normalise
from verifier.values import MP, RANGES, Values

HOUSE = Path(__file__).parent.parent
SHARED = HOUSE.parent / "shared"
LABELLED = SHARED / "verifier" / "dev.jsonl"
ATTACKS = SHARED / "verifier" / "attacks.jsonl"
LIMIT = 0.5  # CPU seconds of any one check: a busy machine may stop a process for longer


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """Keep the collector from all that is in memory now: its time would count as the verifier's."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def right(answer, gold, strict=True):
    started = time.thread_time()
    verdict = verify(rf"So it is $\boxed{{{answer}}}$.", gold, strict)
    assert time.thread_time() - started < LIMIT, (answer, gold)
    assert type(verdict) is bool
    return verdict


def pairs(table):
    """(gold, answer) of the lines of a table."""
    return [tuple(line.strip().split(" | ")) for line in table.strip().splitlines()]


# ---- Hand-made pairs: gold | answer --------------------------------------------------------------

RIGHT = {
    "numbers": r"""
        5 | 5.0
        -3 | −3
        \frac{1}{2} | 1/2
        \frac{1}{2} | .5
        \frac{1}{2} | \frac{2}{4}
        \frac12 | 0.5
        \frac{7}{2} | 3\frac{1}{2}
        \frac{7}{2} | 3 1/2
        \frac{7}{2} | 3\tfrac12
        -\frac{7}{2} | -3\frac{1}{2}
        -\frac{7}{2} | -3 1/2
        1000 | 1 000
        1000000 | 1{,}000{,}000
        12345 | 12,\!345
        12345 | 12\,345
        \frac{1}{3} | 0.\overline{3}
        \frac{1}{6} | 0.1\overline{6}
        \frac{1}{3} | 0.\bar{3}
        0.\overline{12} | \frac{4}{33}
        6.02 \times 10^{23} | 602 \cdot 10^{21}
        6.02\times10^{23} | 6.02e23
        1.2\times10^{-3} | 0.0012
        25\% | 25
        25\% | 25 percent
    """,
    "roots and constants": r"""
        \sqrt{8} | 2\sqrt{2}
        \sqrt{8} | 2√2
        \sqrt[3]{16} | 2\sqrt[3]{2}
        2^{1/3} | \sqrt[3]{2}
        \frac{\sqrt{2}}{2} | \frac{1}{\sqrt{2}}
        \sqrt{3+2\sqrt{2}} | 1+\sqrt{2}
        \frac{\sqrt{6}-\sqrt{2}}{4} | \sin 15^\circ
        \cos 75^\circ | \frac{\sqrt{6}-\sqrt{2}}{4}
        \tan 15^\circ | 2-\sqrt{3}
        \sin \frac{\pi}{6} | \frac{1}{2}
        \pi | π
        2\pi | 2 pi
        \frac{\pi}{4} | \arctan 1
        \frac{\pi}{4} | \tan^{-1}(1)
        e^{i\pi} | -1
        3 | \log_2 8
        3 | \log_{2}(8)
        2 | \log 100
        \ln 2 | \ln(2)
        1+\ln 2 | \ln(2e)
        2\ln 3 | \ln 9
    """,
    "functions": r"""
        5! | 120
        \binom{5}{2} | 10
        10 | {5 \choose 2}
        |x| | \sqrt{x^2}
        \lfloor 3.7 \rfloor | 3
        3 | \lceil 2.1 \rceil
        |{-5}| | 5
    """,
    "expressions": r"""
        x^2-4 | (x-2)(x+2)
        (x+1)^2 | x^2+2x+1
        \frac{x^2-1}{x-1} | x+1
        \frac{1}{x}+\frac{1}{y} | \frac{x+y}{xy}
        \sin 2x | 2\sin x\cos x
        \sin^2 x | 1-\cos^2 x
        \cos 2x | 1 - 2 \sin^2 x
        \tan x | \frac{\sin x}{\cos x}
        2 \sin b \cos a | 2\cos a\sin b
        \sec x | 1/\cos(x)
        e^{2x} | (e^x)^2
        x\sqrt{x} | x^{3/2}
        42x\sqrt{5x} | 42\sqrt{5x^3}
        30p \sqrt{p} | 30p^{\frac{3}{2}}
        a^2b | ba^2
        3n^2-18 | 3(n^2-6)
    """,
    "equations": r"""
        y = 2x+3 | y=3+2x
        y = 2x+3 | 2x-y+3=0
        y=2x+3 | 2x+3
        2x+3y=6 | 4x+6y=12
        2x+3y=6 | 6=2x+3y
        x^2+y^2=13 | y^2 = 13 - x^2
        \frac{x^2}{16}-\frac{y^2}{9}=1 | 9x^2-16y^2=144
        x=5 | 5
        5 | x=5
        x=5 | 5=x
        x \in (1,2] | (1,2]
    """,
    "tuples": r"""
        (1,2) | (1, 2)
        (1,2) | \left(1,2\right)
        (1,2) | (x,y)=(1,2)
        (x,y)=(3,2) | (3,2)
        (\frac12,3) | (0.5, 3)
        (6,235^\circ) | (6, 235^{\circ})
    """,
    "lists": r"""
        1,2,3 | 3,2,1
        1,2 | \{2,1\}
        1,2 | 1 and 2
        1,2 | 1\text{ and }2
        1,2 | 1 \text{ or } 2
        1,2 | x=1, x=2
        1,2 | x=1 \text{ or } x=2
        1,2 | x = 1, 2
        2, 3, \text{ and } 4 | 2,3,4
        6, 8\text{, and }10 | 6,8,10
        -2 \text{ or } -12 | -12, -2
        (-4, 27);(2, 15) | (2,15), (-4,27)
        1,-1 | \pm 1
        \pm 1 | 1,-1
        1\pm\sqrt{2} | 1+\sqrt{2}, 1-\sqrt{2}
        3 \pm 2 \sqrt{2} | x = 3 \pm 2\sqrt2
        \{1\pm\sqrt{5},-2\} | -2, 1+\sqrt5, 1-\sqrt5
        \{1\pm\sqrt{5},-2\} | \{-2, 1\pm \sqrt{5}\}
        \frac{3\pm\sqrt{5}}{2} | \frac{3+\sqrt5}{2}, \frac{3-\sqrt{5}}{2}
        2+2i,\,-2-2i,\,-2+2i,\,2-2i | \pm 2 \pm 2i
    """,
    "sets of reals": r"""
        [0,1) | [0, 1)
        (-\infty,0] | x \le 0
        x \ge 3 | [3,\infty)
        (1,2) | 1<x<2
        1<x<2 | (1,2)
        x>3 | 3<x
        1<x<2 | 2>x>1
        (-\infty,-1)\cup(1,\infty) | x<-1 \text{ or } x>1
        (-\infty,2)\cup(2,\infty) | x \neq 2
        (-\infty,2)\cup(2,\infty) | \mathbb{R} \setminus \{2\}
        (-\infty,\infty) | \mathbb{R}
        (-\infty,\infty) | x \in \mathbb{R}
        (0,9) \cup (9,36) | (0,36) \setminus \{9\}
        [1,2]\cup[3,4] | [3,4]\cup[1,2]
        (-\infty, 3] | (−∞, 3]
    """,
    "matrices": r"""
        \begin{pmatrix}1\\2\end{pmatrix} | \begin{bmatrix}1\\2\end{bmatrix}
        \begin{pmatrix}1&2\\3&4\end{pmatrix} | \left(\begin{array}{cc}1&2\\3&4\end{array}\right)
        \begin{pmatrix}1/2\\2\end{pmatrix} | \frac{1}{2}\begin{pmatrix}1\\4\end{pmatrix}
        \begin{pmatrix}1\\2\end{pmatrix} | \begin{matrix}1\\2\end{matrix}
        \begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1\\2\\ \end{pmatrix}
    """,
    "units": r"""
        10\text{ minutes} | 10 min
        5\text{ cm} | 5
        5\text{ cm} | 5 cm
        5 | 5\text{ cm}^2
        5 | 5\ \mathrm{cm}^2
        5\text{ m} | 5 m
        5\text{ m} | 5 \text{ meters}
        25\text{ ft} | 25\text{ feet}
        25 | 25 square feet
        25 | 25\text{ square units}
        16\pi | 16\pi\text{ cm}^3
        \frac{68}{3}\text{ pounds} | \frac{68}{3}
        30^\circ | 30
        30 | 30°
        30^\circ | 30\text{ degrees}
        75^\circ, 75^\circ | 75^\circ, 75^\circ
        10^\circ, 50^\circ, 54^\circ | 54,50,10
        \$5 | 5
        \$5.50 | 5.50
        \$1,\!657 | 1657
        \$306,\!956.63 | 306956.63
        5.4 \text{ cents} | 5.4
        60 | 60 miles per hour
        60 | 60\text{ mph}
        7\text{ hours}. | 7
    """,
    "words": r"""
        \text{(C)} | C
        \text{(C)} | (C)
        \text{(C)} | \textbf{(C)}
        \text{(C)} | c
        \text{(C)} | \text{(C) } 5
        \text{(C)} | \textbf{(C)}\ 5
        \text{(C)} | C. 5
        \text{(C)} | \mathrm{(C)}
        \text{C} | \text{(C)}
        \text{A,B} | A, B
        \text{A,B} | B,A
        D, E | E, D
        \text{A, D, F, G, H} | A,D,F,G,H
        \text{Evelyn} | Evelyn
        \text{Evelyn} | \text{evelyn}
        \text{two lines} | two lines
        \text{October 30} | October 30
        \text{4:30 p.m.} | 4:30\text{ PM}
        8\!:\!34 \text{ p.m.} | 8:34\text{ p.m.}
        05\!:\!00 | 05:00
        3:1 | 3 : 1
        1:4 | 1\!:\!4
        \mbox{four} | 4
        5 | \text{five}
        12 | 12^{\text{th}}
        12 | 12th
    """,
    "odd golds of MATH": r"""
        52_8 | 52_{8}
        52_8 | (52)_8
        52_8 | 52_{\text{8}}
        \text{A5}_{11} | A5_{11}
        11 | 11_{10}
        0.56 = 56\% | 56\%
        0.56 = 56\% | 0.56
        \$\dfrac23 \approx \$0.67 | \frac{2}{3}
        \approx 8.24 \text{ mph} | 8.24
        AB=9, CD=4 | AB = 9, CD = 4
        AB=9, CD=4 | CD=4, AB=9
        AB=12+12\sqrt{3} | 12+12\sqrt{3}
        f(x)=x^2 | x^2
        x^2 | f(x) = x^2
        x^2+1 | p(x) = x^2+1
        3-2f(x) | -2f(x)+3
        f(4 - x) | f(-x+4)
        -80\leq g(x)\leq 82 | -80 \le g(x) \le 82
        s^2 \le 8r^2 | 8r^2 \ge s^2
        \tan \theta = 2\theta | 2\theta = \tan \theta
        \frac{1}{7}\triangle ABC | \frac{\triangle ABC}{7}
        i \sqrt{2} | \sqrt{2} i
        -\frac34i | -\frac{3}{4}i
        \frac{1}{4} - \frac{3}{7} i | \frac{7-12i}{28}
        1,i,-i | i,-i,1
        \log\left(\frac{2007}{2006}\right) | \log \frac{2007}{2006}
        \cos(6^\circ)\sin(12^\circ)\csc(18^\circ) | \frac{\cos 6^\circ \sin 12^\circ}{\sin 18^\circ}
        12^{1/7} | \sqrt[7]{12}
        3 \sec \frac{1}{2} \theta | \frac{3}{\cos \frac{\theta}{2}}
        [a +b, b] | [a+b,b]
    """,
    "mixed": r"""
        0 | \sqrt{2}+\sqrt{3}-\sqrt{5+2\sqrt{6}}
        0 | \sin^2 2 + \cos^2 2 - 1
        0 | \sqrt{7}-\frac{7}{\sqrt{7}}
        0 | \sqrt{11}\cdot\sqrt{13}-\sqrt{143}
        \{1,2,3,4\} | \{1,3\} \cup \{2,4\}
        \frac{n(n+1)}{2} | \binom{n+1}{2}
        (-\infty,\infty) | \text{all real numbers}
        \sqrt[3]{-8} | -2
        \begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix} 1 \\[4pt] 2 \end{pmatrix}
        \frac{3}{4} | \nicefrac{3}{4}
        -\sqrt[6]{2} | \sqrt[3]{-\sqrt{2}}
        -1 | (-1)^{1000000001}
        \frac{4}{9} | \left(\frac{8}{27}\right)^{2/3}
        2i | \sqrt{-4}
        \frac{x}{2}+\frac{y}{3}=1 | 3x+2y=6
        e^{\ln 2} | 2
        2 \cdot 2^x | 2^{x+1}
        \sqrt{2x} | \sqrt{2}\sqrt{x}
        n \geq 3 | [3, \infty)
        \frac{\pi}{6} | \arcsin\frac{1}{2}
        12\text{ m/s} | 12 m/s
        33\frac{1}{3}\% | \frac{100}{3}\%
        20^\circ | 20\text{ degrees}
        20\% | 20 percent
        \mathbf{i}+2\mathbf{j} | 2\mathbf{j}+\mathbf{i}
        e^{i\pi/3} | \frac{1}{2}+\frac{\sqrt{3}}{2}i
        \frac{1}{2} | P(A) = \frac{1}{2}
        6 | \overline{AB} = 6
        \sqrt{5} | |z| = \sqrt{5}
        120 | \text{Area} = 120 \text{ cm}^2
        0.333... | \frac{1}{3}
        [2,5)\cup(5,\infty) | 2 \le x < 5 \text{ or } x > 5
        0 | \sqrt{2}-\sqrt{2}
        0 | \sqrt{3+2\sqrt2}-1-\sqrt2
        1 | \sin^2 1 + \cos^2 1
        2^{1000} | 4^{500}
        \infty | +\infty
        -\infty | −∞
        x^{100}-1 | -1+x^{100}
        \frac{x^{2000}-1}{2} | \frac{1}{2}x^{2000}-\frac12
        x_1+x_2 | x_2 + x_1
        a_n = 2n+1 | 2n+1
        a_n=2n+1 | a_{n} = 1 + 2n
        \alpha+\beta | \beta+\alpha
        \emptyset | \varnothing
        \emptyset | \{\}
        \frac{1}{29,\!322,\!216} | \frac{1}{29322216}
        \frac{1,000}{3} | 1000/3
        5 | $5$
        5 | \(5\)
        5 | \[5\]
        x+1 | $x+1$
        50 | 50\%
        3.0 | 3
        8 | 2^3
        \frac{3}{4} | {3}/{4}
        \frac{3}{4} | (3/4)
        -\frac{1}{2} | \frac{-1}{2}
        -\frac{1}{2} | \frac{1}{-2}
        \frac{a}{b} | a/b
        \sqrt{2} | 2^{0.5}
        \sqrt{x^2-1} | (x^2-1)^{1/2}
        2x^2 | 2x²
        2\cdot 3^{20} | 3^{20}\cdot 2
        4\sqrt{3}+4 | 4(1+\sqrt 3)
        x=2,y=3 | x=2, y=3
        (2,3) | x=2, y=3
        13.18 | \sqrt{173.7124}
        90 | \angle A = 90^\circ
        \frac{\sqrt{3}}{2} | \sqrt{\frac{3}{4}}
        6 | 6\text{ ways}
        6 | 6 \text{ different ways}
        10 | \text{10 apples}
        10 | 10 apples
        x<5 | 5>x
        x \leq 5 | x \leqslant 5
        \text{no solution} | \text{No solution}
        \text{No solution.} | no solution
        \frac{1}{2}\pi | \frac{\pi}{2}
        2007 + \frac\pi 2 | 2007+\frac{\pi}{2}
        \sqrt2 | \sqrt{2}
        7\sqrt2 | 7 \cdot \sqrt{2}
        \dfrac 3 8 | 0.375
        \frac{270}7\text{ degrees} | \frac{270}{7}
        5(\sqrt{3}-1) | 5\sqrt{3}-5
        \frac{9}{\pi^2}(\sqrt{3}+3) | \frac{9\sqrt3+27}{\pi^2}
        \frac{bx}{h}(h-x) | bx - \frac{bx^2}{h}
        (8\sqrt3, 14, 2, 4) | (8\sqrt{3},14,2,4)
        n=1,2,3 | 1,2,3
        x > 2 \text{ and } x < 5 | (2,5)
        2 < x \text{ and } x < 5 | 2<x<5
        120 | 5 \times 4 \times 3 \times 2 \times 1
        y=\frac{1}{2}x+2 | y = 0.5x + 2
        17 | 17.
        (3,4] | \left(3,4\right]
        \frac{11}{15}\text{ days} | \frac{11}{15} days
        9 | 3^2 = 9
        x=\frac{3}{2} | x = 1.5
        \left(\frac{3}{4}, \infty\right) | x > \frac{3}{4}
        (2,\infty) | \{x \mid x > 2\}
        (2,\infty) | \{x : x > 2\}
        (2,\infty) | \{x \in \mathbb{R} \mid x>2\}
        3, -3 | x = \pm 3
        \text{Yes} | yes
    """,
    "names": r"""
        4 | f(3) = 4
        11 | a+b = 11
        133 | m+n = 100+33 = 133
        3 | x_{\max} = 3
        3 | y_{\text{min}} = 3
        5 | \bar{x} = 5
        12 | [ABC] = 12
        7 | |AB| = 7
        3 | \lim_{x\to 0} f(x) = 3
        \frac{1}{3} | P(A) = \frac{1}{3}
        25 | a^2+b^2 = 25
        n^2 | S_n = n^2
        \frac{x+1}{2y} | \Phi(x,y) = \frac{x}{2y}+\frac{1}{2y}
    """,
    "units and words": r"""
        5 | 5\,\mathrm{m/s}
        40 | 40\,\mathrm{N}
        25 | 25^\circ C
        25^\circ\text{C} | 25^\circ C
        5 | 5 sec
        5 | 5 in.
        69 | 69 slices of pizza
        12 | 12 \text{ cups of flour}
        60 \text{ mph} | 60 mph
        8 | 8 \text{ N}\cdot\text{m}
        8 | 8 \mathrm{~kg} \mathrm{~m}^{-3}
        5\text{ m}^2 | 5 square meters
        \$5 | 5 \text{ dollars}
        5 \text{ apples} | 5 apples
        \frac{\pi}{6} | 30^\circ
        0 | \sin 180^\circ
        10 | 20\%\cdot 50
        10 | 20\%\cdot 50 = 10
        \text{Yes} | yes
        Yes | \text{yes}
        \text{odd} | Odd
        A | A: A polygenic risk score
        \text{(C)} | \text{(C) } 3 \text{ and } 5
    """,
    "notation": r"""
        2^6 \cdot 3^5 \cdot 5^4 | 2^6 3^5 5^4
        2^3 \cdot 7^2 | 2^3 * 7^2
        xyzw | wxyz
        3e+2 | 2+3e
        \frac{2e-1}{3} | \frac{2e}{3}-\frac{1}{3}
        1e-3 | 0.001
        3^{10} | 3¹⁰
        \epsilon | ε
        25,100,55 | 25, 55, 100
        2,100 | 100, 2
        2,100 | 2100
        \frac{1205}{999} | 1 206/999
        \frac{1}{3} | 0.(3)
        25 | `25`
        25 | \textcolor{blue}{25}
        120 | 5! = 120
        5 | 5 \quad
        \frac{3}{2}\cdot 5 | 2\frac{3 \cdot 5}{4}
    """,
    "functions of more kinds": r"""
        (n+1)! | (n+1)\cdot n!
        \binom{n}{n-2} | \binom{n}{2}
        \operatorname{csch} x | \frac{1}{\sinh x}
        \lceil x \rceil | -\lfloor -x \rfloor
        \lfloor \frac{n}{2} \rfloor + 1 | \lfloor \frac{n+2}{2} \rfloor
        |x-1000| | |1000-x|
        2\ln|x| | \ln x^2
        \sqrt{1/n} | \frac{1}{\sqrt{n}}
        \sum_{k=0}^{n} \frac{1}{k!} | \sum\limits_{k=0}^n\frac{1}{k!}
        \int_0^1 x^2\,dx | \int_{0}^{1} x^{2} dx
        x f(x+1) | f(1+x)x
        \begin{cases} 1 & x>0 \\ 2\end{cases} | \begin{cases} 1, & \text{if } x>0 \\ 2\end{cases}
        \begin{cases} x=1 \\ y=2 \end{cases} | (1,2)
        \begin{cases} x=1 \\ y=2 \end{cases} | x=1,\ y=2
    """,
    "equations and sets of more kinds": r"""
        y=\frac{k}{x} | xy=k
        y=\frac{2x+1}{x-1} | xy-y=2x+1
        x+y<\sqrt{2} | \sqrt{2}x+\sqrt{2}y<2
        x>2 \text{ or } x<-2 | |x|>2
        -5<x<1 | |x+2|<3
        x<3 | 2x+1<7
        (0,1) | ]0,1[
        n \equiv 1 \pmod 3 | n\equiv1\ (\mathrm{mod}\ 3)
        k\pi-\frac{\pi}{6}, k\in\mathbb{Z} | -\frac{\pi}{6}+k\pi\ (k\in \mathbf{Z})
        x=\frac{\pi}{4}+n\pi, n\in\mathbb{Z} | n \in \mathbb{Z}, \frac{\pi}{4}+\pi n
        \bar{x}=4, \bar{y}=2 | \bar{y}=2 \text{ and } \bar{x}=4
        \begin{pmatrix}1&2\\3&4\end{pmatrix} | \frac12\begin{pmatrix}2&4\\6&8\end{pmatrix}
    """,
}
WRONG = r"""
    5 | -A = 5
    5 | -\theta = 5
    12 | -\alpha\beta = 12
    \frac{1}{3} | -P(A) = \frac{1}{3}
    11 | a+b = 12
    5 | 2x = 5
    9 | \theta^\theta = 9
    9 | x^2 = 9
    3 | \frac{1}{R} = 3
    2x | x = 2x
    x+y=5 | 5
    5 | -1 = 5
    5 | 5 \approx 6
    4 | f(4) = 3
    P(A) = \frac12 | P(B) = \frac12
    5 | 5 \text{ halves}
    2 | 2 \text{ thirds}
    5 | 5 \text{ squared}
    5 | 5 \text{ dozen}
    5 | 5 \text{ factorial}
    5 | 5 \text{ minus one}
    5 | 5 \text{ below zero}
    5 | 5 \text{ percent of 40}
    5 | 5 \text{ billionths}
    5 | 5 \text{ is wrong}
    5 | 5 \text{ if even, else 4}
    5 | 5 \text{ perhaps 4}
    5 | 5 \text{ maybe}
    5 | 5 \text{ vs 6}
    5 | 5 \text{ to 6}
    5 | 5 \text{ can't be}
    5 | 5 \text{ rejected}
    8 | 3+5\text{i}
    2 | 2\text{x}
    13 | 13st
    5 \text{ J} | 5 \text{ N}
    5 \text{ kHz} | 5 \text{ MHz}
    5 \text{ mg} | 5 \text{ kg}
    \$5 | 5 \text{ cents}
    5 \text{ ms} | 5 \text{ s}
    5 \text{ cm}^2 | 5 \text{ cm}^3
    5 \text{ m} | 5 \text{ m}^2
    5 \text{ W} | 5 \text{ kW}
    5 \text{ MW} | 5 \text{ mW}
    30^\circ C | 30^\circ F
    5 \text{ boys} | 5 \text{ girls}
    32 | 2 \text{ h } + 30 \text{ min}
    1000 | 20\%\cdot 50
    0.25 | 25\%
    \text{Yes} | \text{Not yes}
    \text{even} | \text{not even}
    A | A: not b
    A | A: c
    A | (A) is wrong
    A | (A), (b), (c), (d)
    5 | \cancel{5}
    15 | ~~15~~
    f(x) | f(-x)
    f_{12}(x) | f_{21}(x)
    f(x+1) | f(x-1)
    x | \max(x, 0)
    x | \max(x, -1000000000)
    x | \min(x, 2^{100})
    x | |x+10^{12}|-10^{12}
    x^2+x | |x^2+x|
    x^2 | x|x|
    \lfloor n\rfloor + 1 | \lceil n\rceil
    2^{\lceil n/2\rceil} | 2^{\lfloor n/2\rfloor+1}
    n | n+\lfloor n/10^9\rfloor
    -1 | \lfloor x\rfloor+\lfloor -x\rfloor
    e^x | e^x+\sin(32\pi x)
    7 | 7+\sin(32\pi x)
    \sqrt{2} | \sqrt{2+10^{-150}}
    \sqrt{2} | \sqrt{2+10^{-400}}
    0 | \sqrt{10^{240}+1}-10^{120}
    0 | e^{-1000}
    1 | 1+e^{-1000}
    1 | \tanh(1000)
    1 | \cos(10^{-200})
    e | (1+10^{-200})^{10^{200}}
    262537412640768744 | e^{\pi\sqrt{163}}
    2x+3y=1 | x=x
    x^2+y^2=25 | xy=yx
    x^2=x | x=1
    y=\frac{k}{x} | xy=2k
    x>2 \text{ or } x<-2 | |x|\ge 2
    x>2 \text{ or } x<-2 | |x|<2
    x>1 \text{ or } x<2 | x>1, x<2
    (1,2) | (1,2) \text{ or } (2,1)
    n \equiv 1 \pmod 3 | n \equiv 2 \pmod 3
    n \equiv 1 \pmod 3 | n \equiv 1 \pmod 4
    \sum_{k=0}^{n} k | \sum_{k=1}^{n} k^2
    \int_0^1 x^2\,dx | \int_0^2 x^2\,dx
    \begin{cases} 1 & x>0 \\ 2 & x\le 0\end{cases} | \begin{cases} 2 & x>0 \\ 1 & x\le 0\end{cases}
    \begin{cases} x=1 \\ y=2 \end{cases} | (2,1)
    1,1,2 | 1,2,2
    1,000,000 | 1,000
    4,096 | 4, 96
    1, 234 | 1234
    x^{2y} | x^2y\text{}
    \sin x | \sin(x, y)
    2^6 3^5 | 2^6 3^6
    3e+2 | 302
    (n+1)! | n \cdot n!
    3.00 | \sqrt{9.02}
    5 | 5, 5
    3 | three hundred
    6 | 6\text{ million}
    x < y | x > y
    s^2 \le 8r^2 | s^2 \ge 8r^2
    20\% | 20^\circ
    20^\circ | 20\text{ days}
    f' | f
    75^\circ, 75^\circ | 75^\circ
    (5,3) | (7,2) \cup (9,1)
    (5,3) | x < 1 \text{ and } x > 2
    a | A
    \emptyset | \{\emptyset\}
    \text{(B)} | A or B
    \text{(B)} | AB
    f(x)=x^2 | g(x)=x^2
    [1,1] | 1
    1 | 1 = 2
    1 | 2 = 1
    5 | \text{at least } 5
    5 | > 5
    \arcsin x | \frac{1}{\sin x}
    \log_2 3 | \log_3 2
    \{1,\{2,3\}\} | \{1,2,3\}
    -2^2 | 4
    2^{3^2} | 64
    5 | 6
    5 | 5 or 6
    5 | 5, 6
    5 | x<5
    5 | 5x
    5 | \{5,6\}
    31/2 | 3 1/2
    3 1/2 | 31/2
    \frac{1}{3} | 0.333
    \frac{1}{3} | 0.3333333333
    \sqrt{2} | 1.41421356237
    \sqrt{2} | 1.41421356237309504880168872420969807856967187537694
    40\pi | 125.66
    25\% | 0.25
    25\% | \frac{1}{4}
    (1,2) | 1,2
    1,2 | (1,2)
    [1,2] | 1,2
    (1,2) | (2,1)
    [0,1) | (0,1]
    [0,1] | (0,1)
    1,2 | 1
    1,2 | 1,2,3
    1,2,2 | 1
    1011_2 | 1011
    1011_2 | 11
    1011_2 | 1011_3
    5\text{ m} | 5\text{ cm}
    x=5 | y=5
    \begin{pmatrix} 1 \\ 2 \end{pmatrix} | \begin{pmatrix} 1 & 2 \end{pmatrix}
    \begin{pmatrix} 1 \\ 2 \end{pmatrix} | (1,2)
    3:1 | 3
    x^2+C | x^2+K
    6\cdot 10^3 | 6x10^3
    3,5 | 3.5
    |x| | x
    x | |x|
    \text{(C)} | \text{(D)}
    \text{(C)} | (C) or (D)
    \text{(C)} | C, D
    \text{(C)} | \text{(C) or (D)}
    \text{Alice} | \text{Alice or Bob}
    \text{Alice} | \text{not Alice}
    \frac{1}{2004!} | \frac{1}{2006!}
    10^{-20} | 10^{-21}
    .0000672 | .0000673
    e^{-1000} | e^{-1001}
    2^{1000} | 2^{1000}+1
    2^{100000} | 2^{100000}+1
    10^{40}+\sqrt{2} | 10^{40}+\sqrt{3}
    \frac{1}{3}\pi | \frac{1}{3}
    \sqrt[3]{13} | \sqrt{13}
    x>3 | x\ge 3
    x>3 | x<3
    (-\infty,3) | (-\infty,3]
    (-\infty,2)\cup(2,\infty) | (-\infty,\infty)
    x<5 | y<5
    \text{CBAD} | \text{ABCD}
    CD | DC
    1,2 | 1,3
    \{1,2\} | \{1,2,3\}
    3 \pm 2 | 3+2
    1\pm\sqrt{19} | 1\pm\sqrt{18}
    f(x) | f(y)
    x_1 | x_2
    x^2+y^2=13 | 13
    x^2+y^2=13 | x^2+y^2
    x - 3z = 0 | 0
    y=2x+3 | 3
    y=2x+3 | y=3x+2
    \frac{1}{23}\text{ cm} | \frac{12}{3}\text{ cm}
    1.5\text{ cm} | 15\text{ cm}
    \text{4:30 p.m.} | 4:30\text{ a.m.}
    12:00 | 1:00
    \emptyset | 0
    0 | \emptyset
    \text{none} | 0
    30^\circ | \frac{\pi}{3}
    \sin 30 | \sin 30^\circ
    \pi | \frac{22}{7}
    \pi | 3.14
    \infty | -\infty
    \infty | 10^{100}
    3 | 4=5=3
    5 | 4 = 5
    5 | 4 \approx 5
    42 | 42 \neq 42
    42 | 0 \le x \le 100
    5 | 5!
    5 | \sqrt{5}
    5 | -5
    5 | |5|+1
    5 | 5^5
    0.5 | 5\%
    \frac{a}{b} | \frac{b}{a}
    (x,y) | (x,t)
    e^{2x} | e^x
    2x | x^2
    1 | \sin 1
    \log 2 | \ln 2
    abc | abd
    \text{odd} | \text{even}
    \text{June 20} | \text{June 21}
    7:32 | 32:7
    AB=9, CD=4 | AB=4, CD=9
    AB=9, CD=4 | 4, 9
    (2,3) | x=3, y=2
    \text{Softball, Kickball, Picnic} | \text{Picnic, Kickball, Softball}
    x=1,y=2 | x=2,y=1
    x \ne 2 | x = 2
    x \ne 2 | 2
    [1,2] | \{1,2\}
    \begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{pmatrix}1&3\\2&4\end{pmatrix}
    (1,234) | 1234
    (1,2,3) | (1,23)
    (1,2) \cup (3,4) | (1,2),(3,4)
    1 + \frac{1}{e} | 1 - \frac{1}{e}
    12 | 1 2
    12 | 1,2
    123 | 1,23
    1234 | 12,34
    2\frac{1}{2} | 2 \cdot \frac{1}{2}
    1 | 2\frac{1}{2}
    0 | \frac{1}{\infty}
    \frac{1}{0} | \frac{2}{0}
    5 | 5 5
    5 | 5\text{ or so}
    5 | \text{not }5
    5 | \ne 5
    x+1 | x+1+0.0001
    \sqrt{2}+\sqrt{3} | \sqrt{5+2\sqrt{6}}+10^{-30}
    2 | 2abcd
    x^2 | x^{2.0001}
    3.14 | 3.1400001
    0.63 | 063
    10{,}000 | 9998.57
    1,2,3 | 3,2
    (0,1),(2,3) | (0,1),(3,2)
    x^2-4=0 | x^2-4
    x^2-4=0 | x=2
    x=\pm 2 | x=2
    x > 2 \text{ or } x < -2 | (-2,2)
    5 | \boxed{5}+1
"""


@pytest.mark.parametrize("kind", RIGHT)
def test_right_answers(kind):
    """No reward for a right answer that is spelled in another way."""
    assert not [pair for pair in pairs(RIGHT[kind]) if not right(pair[1], pair[0])]


@pytest.mark.parametrize("gold, answer", pairs(WRONG))
def test_wrong_answers(gold, answer):
    """Reward for another value, another structure, several guesses or a lost bracket."""
    assert not right(answer, gold)


def test_same_text_is_right_whatever_it_means():
    """A gold that the parser cannot read or compute, so that no completion is ever right."""
    for gold in (
        r"p \implies q",
        r"e^{e^{e^{e^e}}}",
        r"\sum_{n=1}^\infty \frac{1}{n^3}",
        "9^{9^{9^9}}",
        r"\frac{1}{0}",
    ):
        assert right(gold, gold) and right(gold + ".", gold) and not right(gold + "+1", gold)


def test_the_table_of_the_readme():
    """A README that promises what the verifier does not do."""
    text = (HOUSE / "verifier" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(.+)` \| `(.+)` \| `(.+)` \|$", text, re.MULTILINE)
    assert len(rows) > 20
    for gold, equal, other in rows:
        assert right(equal, gold), (gold, equal)
        assert not right(other, gold), (gold, other)


def test_decimals():
    """The decimal rule: exact decimals are right, approximations only for a gold decimal."""
    assert right("0.125", r"\frac{1}{8}") and right(r"\frac{1}{8}", "0.125")
    assert not right("0.33", r"\frac{1}{3}") and not right(r"\frac{1}{3}", "0.33")
    assert right(r"\sqrt{7}", "2.646") and not right(r"\sqrt{7}", "2.645")
    assert not right("2.646", r"\sqrt{7}") and not right(r"\sqrt{7}", "2.6")


# ---- Random expressions, evaluated here ----------------------------------------------------------

LEAVES = st.one_of(
    st.integers(1, 40).map(lambda n: ("n", n)),
    st.sampled_from([("x",), ("y",), ("pi",)]),
    st.integers(2, 30).map(lambda n: ("sqrt", ("n", n))),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(st.sampled_from("+-*/"), inner, inner),
        st.tuples(st.just("^"), inner, st.integers(2, 3)),
        st.tuples(st.sampled_from(["sin", "cos", "neg"]), inner),
    ),
    max_leaves=8,
)
CONTEXT = mpmath.mp.clone()
CONTEXT.dps = 60


def worth(tree, point):
    """The value of a tree by mpmath, with x and y from the point."""
    kind, *parts = tree
    if kind == "n":
        return CONTEXT.mpf(parts[0])
    if kind in ("x", "y", "pi"):
        return {"pi": +CONTEXT.pi}.get(kind) or point[kind]
    if kind == "^":
        return worth(parts[0], point) ** parts[1]
    values = [worth(part, point) for part in parts]
    if len(values) == 2:
        a, b = values
        return {"+": a + b, "-": a - b, "*": a * b}[kind] if kind != "/" else a / b
    named = dict(sin=CONTEXT.sin, cos=CONTEXT.cos, sqrt=CONTEXT.sqrt, neg=lambda v: -v)
    return named[kind](values[0])


def written(tree, rng):
    """A tree as LaTeX, in a style that the rng draws at every turn; sums and products commute."""
    kind, *parts = tree
    one_of = rng.choice
    if kind == "n":
        return str(parts[0])
    if kind in ("x", "y", "pi"):
        return {"pi": r"\pi "}.get(kind, kind)
    if kind == "^":
        return f"({written(parts[0], rng)})" + one_of(["^%d", "^{%d}", "^{ %d }"]) % parts[1]
    texts = [written(part, rng) for part in parts]
    opening, closing = one_of([("(", ")"), (r"\left(", r"\right)"), (r"\bigl( ", r" \bigr)")])
    if kind == "/":
        over = one_of([r"\frac{%s}{%s}", r"\dfrac{%s}{%s}", r"\tfrac {%s} {%s}", r"{%s \over %s}"])
        return over % tuple(texts)
    if kind in ("sin", "cos"):
        return rf"\{kind}{opening}{texts[0]}{closing}"
    if kind == "sqrt":
        return one_of([r"\sqrt{%s}", r"\sqrt {%s}", "√{%s}", r"(%s)^{1/2}"]) % texts[0]
    if kind == "neg":
        return f"{opening}-{opening}{texts[0]}{closing}{closing}"
    if kind in "+*":
        rng.shuffle(texts)
    sign = {"+": ["+", " + "], "-": ["-", " − "], "*": [r"\cdot ", r" \times ", "*", r"\,"]}
    a, b = (f"{opening}{text}{closing}" for text in texts)
    return f"{opening}{a}{one_of(sign[kind])}{b}{closing}"


def changed(tree, rng):
    """The tree with one part changed."""
    kind, *parts = tree
    if kind == "n":
        return "n", parts[0] + rng.choice([1, 2, 10])
    if kind in ("x", "y", "pi") or rng.random() < 0.2:
        return "+", tree, ("n", rng.randint(1, 3))
    i = rng.choice([i for i, part in enumerate(parts) if isinstance(part, tuple)])
    return kind, *parts[:i], changed(parts[i], rng), *parts[i + 1 :]


def same_worth(a, b):
    """Whether two trees agree at five random points; None where one of them has no value."""
    rng, agree = random.Random(0), []
    for _ in range(5):
        point = {name: CONTEXT.mpf(rng.uniform(0.5, 2)) for name in "xy"}
        try:
            u, v = worth(a, point), worth(b, point)
        except ZeroDivisionError:
            return None
        if max(abs(u), abs(v)) > 1e15 or min(abs(u), abs(v)) < 1e-15:
            return None
        agree.append(abs(u - v) < 1e-25 * max(abs(u), abs(v)))
    return all(agree) if all(agree) == any(agree) else None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(TREES, st.randoms(use_true_random=False))
def test_random_expressions(tree, rng):
    """A style that reads as another value, and a value that reads as the same."""
    a, b, other = written(tree, rng), written(tree, rng), changed(tree, rng)
    if max(len(a), len(b)) < 900 and same_worth(tree, tree):
        assert right(a, b), (a, b)
        if same_worth(tree, other) is False:
            assert not right(written(other, rng), a), (a, other)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.fractions(-50, 50, max_denominator=40), min_size=2, max_size=5), st.randoms())
def test_random_lists_tuples_and_polynomials(values, rng):
    """Order that counts where it does not, or does not where it counts; a lost member."""
    texts = [rf"\frac{{{v.numerator}}}{{{v.denominator}}}" for v in values]
    mixed = [str(v) if rng.random() < 0.5 else rf"{v.numerator}/{v.denominator}" for v in values]
    assert right(f"({','.join(mixed)})", f"({', '.join(texts)})")
    assert right(", ".join(reversed(mixed)), ",".join(texts))
    assert right(r"\{" + ",".join(mixed) + r"\}", ",".join(texts))
    assert not right(",".join([*mixed, "51"]), ",".join(texts))
    assert right(f"({','.join(mixed[::-1])})", f"({','.join(texts)})") == (values == values[::-1])
    factors = "".join(f"(x-({v}))" for v in values)
    coefficients = [Fraction(1)]  # of the product, multiplied out here
    for v in values:
        shifted = [*coefficients, Fraction(0)]
        coefficients = [a - v * b for a, b in zip(shifted, [0, *coefficients], strict=True)]
    n = len(values)
    expanded = "+".join(rf"({c})x^{{{n - i}}}" for i, c in enumerate(coefficients))
    assert right(expanded, factors)
    assert not right(expanded + "+1/1000000", factors)


def points_of(answer, gold):
    """The points at which an answer and a gold one are compared."""
    return Values(parse(normalise(answer)), parse(normalise(gold))).prepare().points


def test_the_sample_points_cannot_be_played():
    """An answer that is wrong everywhere but where functions are compared: at points that stand in
    the code, or that an earlier comparison drew."""
    for gold in ("x^2", "e^x", r"\sin x"):
        drawn = [point["x"] for point in points_of(f"{gold}+1", gold)]
        bump = "".join(f"(x-({MP.nstr(x, 40)}))" for x in drawn[:4])
        assert [point["x"] for point in points_of(f"{gold}+{bump}", gold)] != drawn
        assert not right(f"{gold}+{bump}", gold)
        assert not right(rf"{gold}+\sin(x){bump}", gold)
        assert not right(rf"{gold}+\sin({bump})", gold)


def test_the_sample_points_are_everywhere():
    """Points that are all positive, all above 1, or all multiples of 1/32."""
    for gold in ("x+y", "xy", r"\sin x + y"):
        points = points_of(gold, f"{gold}+1")
        assert len(points) == len(RANGES)
        for name in "xy":
            values = [point[name] for point in points]
            assert min(values) < -1 and max(values) > 100 and any(0 < x < 1 for x in values)
            assert any(-1 < x < 0 for x in values)
            assert all(x * 2**40 != MP.floor(x * 2**40) for x in values)
        assert any(point["x"] * point["y"] < 0 for point in points)
    far = [point["x"] for point in points_of("|x-10^{30}|", "x")]
    assert min(far) < -(10**30) and max(far) > 10**30


# ---- Hostile input -------------------------------------------------------------------------------

BOMBS = {
    "tower": "9^{9^{9^{9^9}}}",
    "factorials": "((((5!)!)!)!)!",
    "binomial": r"\binom{10^9}{5 \cdot 10^8}",
    "minus one to a large power": r"(-1)^{10^{9}}",
    "root of huge index": r"\sqrt[" + "9" * 300 + "]{" + "9" * 300 + "}",
    "many large factorials": "+".join(["2999!"] * 150),
    "expansion": "(a+b+c+d)^{40}(a+b-c-d)^{40}(a-b+c-d)^{40}+1",
    "many powers": "+".join(f"(x+y+{i})^{{40}}" for i in range(60)),
    "plus-minus": r"\pm 1" * 100,
    "list against list": ",".join(rf"\sqrt{{x+{i}}}" for i in range(60)),
    "regions": r" \cup ".join(f"({i},{i}.5)" for i in range(60)),
    "list of regions": ",".join(rf"(0,{i})\cup(70,80)" for i in range(45)),
    "tower of e": "e^{" * 45 + "1" + "}" * 45,
    "powers of bars": r"\left|" * 40 + "ab" + r"c\right|^T" * 40,
    "tower of x": "x^{" * 45 + "x" + "}" * 45,
    "continued fraction": r"1+\frac{1}{" * 48 + "x" + "}" * 48,
    "left to right": "1/2" * 160,
    "signs": "-" * 900 + "1",
    "postfix": "x" + "!" * 900,
    "primes": "x" + "'" * 900,
    "functions": r"\sin" * 240,
    "indices": "x_{" * 45 + "x" + "}" * 45,
    "matrices": r"\begin{array}1&1&1&1&1&1&1&1&1&1\end{array}" * 20,
    "ligatures": "\ufdfa" * 990,
    "sine of a huge number": r"\sin(10^{10^{5}})",
    "exponent": "1e999999999",
    "digits": "7" * 5000,
    "exit": "exit()",
    "import": "__import__('os').abort()",
    "dunder": "x.__class__.__mro__[-1].__subclasses__()",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name):
    """A number, an expansion or a search that is computed before its size is known."""
    bomb = BOMBS[name]
    for gold in ("42", r"\frac{1}{2}", "x^2+1", r"(0,1)\cup(2,3)", "1,2", bomb + "+1"):
        assert not right(bomb, gold)
    for around in (r"\frac{%s}{2}", "(1,%s)", "x=%s", r"[%s,\infty)", r"\{%s,2\}", "%s<x"):
        assert not right(around % bomb, around % "42")


@pytest.mark.parametrize("name", BOMBS)
def test_bounds_are_by_construction(name):
    """A bomb that only the interpreter stops, by its recursion limit or for want of memory."""
    for text in (BOMBS[name], "(" * 240 + "1" + ")" * 240, r"\sin" * 480, "1" + "^x" * 240):
        with contextlib.suppress(ValueError):
            tree = parse(normalise(text))
            Values(tree).at(tree, 0)


def test_expansion_is_bounded():
    """Polynomials that are equal, and that take minutes to multiply out."""
    for power in ("(a+b+c+d)^{50}", "(a+b+c+d)^{20}(a+b-c)^{20}(a-b+c)^{20}"):
        assert right(f"{power}+1", f"1+{power}")
    regions = [rf"(0,{i})\cup(70,80)" for i in range(1, 45)]
    assert type(right(",".join(regions), ",".join(reversed(regions)))) is bool


ALPHABET = [*MACROS, *"0123456789xyzei(){}[]|^_!%&,;:=<>+-*/'.$ \n\0\ud800", r"\frac", r"\sqrt"]
ALPHABET += [r"\begin{pmatrix}", r"\end{pmatrix}", r"\\", r"\text{ cm}", r"\pm", r"\infty", r"\sin"]
ALPHABET += [r"\cup", r"\{", r"\}", "10^{9}", "^{", "}", "!", r"\boxed{", "</think>", "answer is "]


def damaged(gold_and_edits):
    """A gold answer with tokens put in at some places, each over a character."""
    text, edits = gold_and_edits
    for i, token in edits:
        text = text[:i] + token + text[i + 1 :]
    return text


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.one_of(
        st.binary(max_size=200).map(lambda raw: raw.decode("latin1")),
        st.tuples(
            st.sampled_from([gold for gold, _ in pairs(WRONG)]),
            st.lists(st.tuples(st.integers(0, 60), st.sampled_from(ALPHABET)), max_size=4),
        ).map(damaged),
        st.lists(st.sampled_from(ALPHABET), max_size=60).map("".join),
        st.text(max_size=80),
    ),
    st.sampled_from(
        ["42", r"\frac{1}{2}", "x^2+1", "(1,2)", r"\text{(C)}", "[0,1)", "52_8", "y=x"]
    ),
)
def test_fuzz(text, gold):
    """An exception, a hang, or a verdict that is no bool, on noise as answer and as gold."""
    for completion in (text, rf"\boxed{{{text}}}"):
        for strict in (True, False):
            started = time.thread_time()
            assert type(verify(completion, gold, strict)) is bool
            assert type(verify(rf"\boxed{{{gold}}}", text, strict)) is bool
            assert time.thread_time() - started < LIMIT


@pytest.mark.parametrize("thing", [None, 5, 5.0, b"5", ["5"], {}, object()])
def test_what_is_no_text(thing):
    """An exception on an answer column that holds numbers or nothing."""
    assert verify(thing, "5") is False
    assert type(verify(r"\boxed{5}", thing)) is bool
    assert verify(r"\boxed{5}", 5) is True


def test_the_net_under_verify_hides_no_bug():
    """A slip in the code that verify's `except` turns into wrong verdicts: only what cannot be
    read or computed may raise, and only so."""
    texts = [text for table in (*RIGHT.values(), WRONG) for pair in pairs(table) for text in pair]
    texts += [BOMBS[name] for name in BOMBS] + ALPHABET
    rng = random.Random(1)
    for answer, gold in zip(texts, rng.sample(texts, len(texts)), strict=True):
        with contextlib.suppress(ValueError, ArithmeticError):
            assert type(same_answer(answer, gold)) is bool


def test_no_module_of_the_verifier_evaluates_text():
    """`eval` or one of sympy's doors to it, behind which a completion may run code."""
    banned = {"eval", "exec", "sympify", "S", "parse_expr", "parse_latex", "lambdify"}
    banned |= {"simplify", "solve", "equals", "__import__", "getattr", "Symbol", "Poly"}
    for path in (HOUSE / "eval_math.py", *(HOUSE / "verifier").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        called = [n.func for n in ast.walk(tree) if isinstance(n, ast.Call)]
        names = {f.id if isinstance(f, ast.Name) else getattr(f, "attr", "") for f in called}
        assert not names & banned, path


# ---- Labelled answers and every gold -------------------------------------------------------------

needs_shared = pytest.mark.skipif(not LABELLED.exists(), reason="../shared is not here")


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@needs_shared
def test_labelled_answers():
    """A change that costs right verdicts on answers that models, test suites and attackers gave;
    other verdicts in a thread, where a time-out by signal does not work."""
    cases, verdicts = read(LABELLED), []

    def judge():
        for case in cases:
            started = time.thread_time()
            verdict = verify(case["completion"], case["gold"], case["kind"] != "fallback")
            verdicts.append((verdict, time.thread_time() - started < LIMIT))

    judge()
    threads = [threading.Thread(target=judge) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()  # their verdicts are mixed: as many must be right as before
    assert all(fast for _, fast in verdicts[: len(cases)])
    alone = [verdict for verdict, _ in verdicts[: len(cases)]]
    assert not [c["id"] for c, v in zip(cases, alone, strict=True) if v and not c["label"]]
    assert not [c["id"] for c, v in zip(cases, alone, strict=True) if v != c["label"]]
    assert sum(v for v, _ in verdicts[len(cases) :]) == 2 * sum(alone)


@needs_shared
def test_attacks():
    """Answers that were written to fool this verifier, and what a careful human accepts beside
    them: one false positive undoes the rest, one hang stops a run."""
    cases = [case for case in read(ATTACKS) if case["kind"] != "convention"]
    wrong = []
    for case in cases:
        started = time.thread_time()
        verdict = verify(case["completion"], case["gold"], case["kind"] != "fallback")
        assert time.thread_time() - started < 0.2, case["id"]
        if verdict != case["label"]:
            wrong.append(case)
    assert not [case["id"] for case in wrong if not case["label"]]
    assert len(wrong) <= 0.03 * len(cases)


STYLES = [
    lambda s: s.replace(r"\frac", r"\dfrac"),
    lambda s: s.replace(r"\dfrac", r"\tfrac").replace(r"\frac", r"\tfrac"),
    lambda s: rf"\displaystyle {s}.",
    lambda s: rf"\, {s} \;",
    lambda s: f"${s}$",
    lambda s: "{" + s + "}",
    lambda s: (
        re.sub(r"(?<!\\left)([(\[])(.*?)(?<!\\right)([)\]])", r"\\left\1\2\\right\3", s)
        if r"\left" not in s and s.count("(") + s.count("[") == 1
        else s
    ),
    lambda s: s.replace(r"\text{", r"\mbox{").replace("pmatrix", "bmatrix"),
    lambda s: rf"\text{{{s}}}" if re.fullmatch(r"[\w ,.+-]+", s) else rf"\mathbf{{{s}}}",
]


@needs_shared
def test_every_gold_of_math_and_gsm8k():
    """A gold that is not right itself or in another style, or that the next one's answer passes."""
    golds = []
    for path in sorted((SHARED / "data").glob("*.jsonl")):
        for row in read(path):
            gold = row.get("answer", row["solution"])
            golds.append(gold.split("####")[-1].strip() or last_boxed(row["solution"]))
    assert len(golds) == 9319
    golds = [gold for gold in golds if gold]  # two solutions end in an empty box
    assert not [gold for gold in golds if not right(gold, gold)]
    wrong = [(gold, s) for gold in set(golds) for s in STYLES if not right(s(gold), gold)]
    assert not wrong
    # In words: 8 and K=8, 25 and 25\%, 120 and 120 degrees, 21 and 21 dogs are the same.
    bare = lambda s: re.sub(r"\\text\{.*?\}|\^\\circ|\\%|^\w=", "", s).strip()  # noqa: E731
    neighbours = [(a, b) for a, b in itertools.pairwise(golds) if bare(a) != bare(b)]
    assert not [(a, b) for a, b in neighbours if right(a, b) or right(b, a)]


def test_easy_checks_are_fast():
    """A verifier that costs a training run its time: 2,000 easy checks a second are asked for."""
    easy = [(g, a) for kind in ("numbers", "tuples", "units") for g, a in pairs(RIGHT[kind])]
    started = time.process_time()
    for gold, answer in easy * 5:
        verify(rf"\boxed{{{answer}}}", gold)
    assert 5 * len(easy) / (time.process_time() - started) > 1000  # half, for a busy machine


# ---- Answers in files ----------------------------------------------------------------------------


def test_mcnemar_by_enumeration():
    """A one-sided or a normal p: it is the share of coin tosses that are at least as uneven."""
    for n in range(1, 9):
        for k in range(n + 1):
            tosses = [bin(i).count("1") for i in range(2**n)]
            uneven = [t for t in tosses if abs(2 * t - n) >= abs(2 * k - n)]
            assert mcnemar(k, n - k) == pytest.approx(len(uneven) / 2**n)
    assert mcnemar(0, 0) == 1


@pytest.mark.parametrize("lost, won", [(0.05, 0.05), (0.1, 0.3), (0.02, 0.2)])
def test_paired_interval_covers(lost, won):
    """An interval that is too narrow: over all outcomes of 40 pairs it holds the truth in 95 %."""
    n, covered = 40, 0.0
    for a in range(n + 1):
        for b in range(n + 1 - a):
            ways = mpmath.binomial(n, a) * mpmath.binomial(n - a, b)
            _, low, high = paired_difference(a, b, n)
            inside = low <= won - lost <= high
            covered += inside * ways * lost**a * won**b * (1 - lost - won) ** (n - a - b)
    assert 0.94 < covered < 0.995
    difference, low, high = paired_difference(3, 9, n)
    assert paired_difference(9, 3, n) == pytest.approx((-difference, -high, -low))


def graded_file(path, verdicts):
    rows = [
        dict(problem=f"p{i}", gold="5", completion=rf"\boxed{{{5 if v else 6}}}", verdict=v)
        for i, v in enumerate(verdicts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_compare_and_grade_need_no_model(tmp_path, monkeypatch, capsys):
    """Unpaired rates, pairs in the order of the lines, and a grade that needs a checkpoint."""
    a = graded_file(tmp_path / "a.jsonl", [True, True, False, False, True, False])
    b = graded_file(tmp_path / "b.jsonl", [True, False, True, True, True, True])
    said = compare(a, b)
    assert "50.0 % -> 83.3 %" in said and "1 lost and 3 won" in said and "p = 0.625" in said
    (tmp_path / "b.jsonl").write_text(
        "\n".join(reversed((tmp_path / "b.jsonl").read_text().splitlines()))
    )
    assert compare(a, b) == said
    monkeypatch.setattr("sys.argv", ["eval_math.py", "--grade", a])
    monkeypatch.setattr("eval_math.load_base", None)
    main()
    assert "3 of 6: 50.0 %" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["eval_math.py", "--grade", a, "--out", b])
    with pytest.raises(UserError, match="exists"):
        main()


def test_evaluation_writes_every_answer(tmp_path, monkeypatch, capsys):
    """A file without the samples or the truncation flag, or whose verdicts are another's."""
    out = tmp_path / "answers.jsonl"
    monkeypatch.setattr(
        "sys.argv",
        f"eval_math.py --problems 2 --samples 2 --max-new-tokens 12 --out {out}".split(),
    )
    main()
    rows = read(out)
    assert [row["sample"] for row in rows] == [None, None, 0, 1, 0, 1]
    assert [row["problem"] for row in rows[:2]] == [row["problem"] for row in rows[2::2]]
    for row in rows:
        assert row["truncated"] == (row["tokens"] == 12)  # none of these ends with its 12th token
        assert row["verdict"] == verify(row["completion"], row["gold"])
        assert row["extracted"] == extract_answer(row["completion"])
    assert "level" in capsys.readouterr().out
