"""Golden answers in the styles of the five benchmarks, written for the tests, and ways to write the same otherwise."""

import re

GSM8K = ["#### 18", "#### 1,234", "#### 70000", "#### -5", "#### 0", "#### 2.5", "#### 1,000,000", "#### 540"]
MATH = r"""
\frac{3}{56} | \frac43 | -\frac{1}{12} | 2\frac{1}{2} | 90^\circ | \$18.90 | 10\% | 5.4 \text{ cents} | 1,000 | 0.35
11,\! 111,\! 111,\! 100 | \text{(C)} | \text{Evelyn} | \text{even} | 2516_8 | 4210_{5} | \sqrt{51} | 3\sqrt{13}
\left( 3, \frac{\pi}{2} \right) | p - q | 6 - 5i | \begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix} | 2k+2 | x=5
[-2,7] | (0,9) \cup (9,36) | (-\infty, 2) \cup (3, \infty) | 1 \pm \sqrt{19} | y = 2x + 3 | 2 \sqrt{3} \text{ cm}
x^3 + 3x - 6 | (3,4) | 1, -2 | \frac{\sqrt{3}}{2} | \pi | 3, 5, 7 | \frac{270}7\text{ degrees} | e^{2} | -1
864 \mbox{ inches}^2
\frac{1}{2004!} | \binom{10}{5} | 2^{2007} | \frac{3 \pi}{4} | (x+2)(x-7) | \left[0, \frac{1}{2}\right) | 120^{\circ}
"""
AMC = ["27.0", "36.0", "-3.0", "180.0", "1680.0"]
OLYMPIAD = r"""
$2$ | $\frac{1}{2}$ | $1,2$ | $-\frac{1}{3}, \frac{2}{5}$ | $(1,2)$ | $(-1,0),(2,3)$ | $[-1,1)$ | $(0,1] \cup [3, 4)$
$\sqrt{2}, \sqrt{3}$ | $2+\sqrt{3}$ | $\frac{\pi}{6}, \frac{5 \pi}{6}$ | $4 \mathrm{~cm}$ | $(\frac{1}{2}, -3, 4)$
$3^{2n}-1$ | $2^{1009}$ | $8 \sqrt{65}$ | $\frac{n(n+1)}{2}$ | $x=1,x=-3$ | $\log_{2} 3$ | $0.2, 1.5$ | $-13,-3,4$
"""
GPQA = ["A", "B", "C", "D"]


def table(text):
    return [gold.strip() for line in text.strip().splitlines() for gold in line.split(" | ")]


GOLDS = {"gsm8k": GSM8K, "math": table(MATH), "amc": AMC, "olympiad": table(OLYMPIAD), "gpqa": GPQA}


def bare(gold):
    return gold.removeprefix("#### ").strip("$") if not gold.startswith(r"\$") else gold


def rewritings(layout, gold):
    """Texts that give the same answer as gold, by turning its characters mechanically."""
    answer = bare(gold)
    ways = [
        rf"So we get \boxed{{{answer}}}.",
        r"We try \boxed{77} first, which fails." + "\n" + rf"\[\boxed{{{answer}}}\]",
        f"It follows.\nThe answer is ${answer}$.",
        f"Thought.</think>\n**Final Answer:** ${answer}$",
        rf"$\boxed{{ {answer} }}$",
        rf"\fbox{{{answer.replace(' ', '  ')}}}",
    ]
    if layout == "gpqa":
        boxed = [rf"\text{{({answer})}}", rf"\textbf{{({answer})}}\ 5 eV", f"{answer}: 5 eV"]
        lines = [
            f"Answer: ({answer})",
            f"ANSWER: {answer}",
            f"**Answer: {answer}) 5 eV**",
            f"The answer is option {answer}.",
        ]
        return ways + lines + [rf"\boxed{{{way}}}" for way in boxed]
    if re.fullmatch(r"-?[\d,]+(\.\d+)?", answer) and layout in ("gsm8k", "amc"):
        plain = answer.replace(",", "").removesuffix(".0")
        grouped = f"{int(plain):,}" if "." not in plain else plain
        ways += [
            f"#### {plain}",
            f"#### {grouped}",
            f"Answer: ${plain} dollars",
            f"The answer is {plain} eggs, since it fits.",
        ]
        boxed = [
            grouped.replace(",", "{,}"),
            f"x = {plain}",
            rf"{plain}\text{{ apples}}",
            rf"\${plain}",
            plain.replace("-", "−"),
        ]
        ways += [rf"\boxed{{{way}}}" for way in boxed]
        if "." not in plain:
            ways += [f"#### {plain}.00", rf"\boxed{{{plain}.0}}"]
    boxed = {
        answer.replace(r"\frac", r"\dfrac"),
        answer.replace(r"\frac", r"\tfrac"),
        answer.replace(" ", ""),
        answer.replace("(", r"\left(").replace(")", r"\right)").replace(r"\left\left", r"\left"),
        re.sub(r"^(-?)\\frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", answer),
        re.sub(r"(?<=\d),(?=[\d-])", ", ", answer) if layout == "olympiad" else answer,
        answer.replace(r"\pi", "π").replace(r"\infty", "∞").replace(r"\cup", "∪"),
        answer.replace("^", " ^ ")
        if "circ" not in answer
        else answer.replace(r"^\circ", "°").replace(r"^{\circ}", "°"),
    }
    boxed = {way for way in boxed if r"\left\right" not in way and not re.search(r"\\(?:text|mbox)[a-z]", way)}
    return ways + [rf"\boxed{{{way}}}" for way in sorted(boxed)]
