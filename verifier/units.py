"""What stands behind a number: units and nouns that must not contradict, words that change it."""

import collections
import itertools
import re

# Each unit with its other names, commas between; in the short ones capitals count: MHz, mHz.
NAMES = """in inch inches, ft foot feet, yd yard, mi mile, s sec second, min minute, h hr hour, day,
week, month, year yr, lb pound lbs, oz ounce, ton, dollar USD buck, cent penny pennies, euro, gbp,
yuan, L l liter litre, gal gallon, quart, pint, acre, C celsius, F fahrenheit, am a.m, pm p.m,
percent percentage, degree deg, rad radian, mph, kph kmh"""
SI = """m meter metre, g gram, s, A amp, V volt, W watt, J joule, N newton, Hz hertz, Pa pascal, K
kelvin, L liter litre, mol mole, eV, cal calorie, ohm, bit, byte"""
PREFIXES = "k kilo, M mega, G giga, c centi, m milli, n nano, d deci"
GROUPS = [group.split() for group in f"{NAMES}, {SI}".split(",")]
PAIRS = itertools.product(SI.split(","), PREFIXES.split(","))
GROUPS += [[p + n for p, n in itertools.product(b.split(), a.split())] for a, b in PAIRS]
UNIT = {}
for names in GROUPS:
    plurals = [name + "s" for name in names if len(name) > 2]
    UNIT = dict.fromkeys(names + plurals, names[0]) | UNIT
POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
CURRENCIES = {"dollar", "euro", "gbp"}  # also before a number
# What may stand behind a number without \text: no product of variables is spelled so.
BARE = {name for group in NAMES.split(",") for name in group.split() if len(name) > 1}
BARE |= {name + "s" for name in BARE} | {"cm", "mm", "km", "kg", "ft", "sq", "cu", "per", "way"}
# Words that make another answer of a number, or none. Nouns do not: 69 slices of pizza.
CHANGING = r"""zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|pi|
(?-i:k)|(?:twen|thir|for|fif|six|seven|eigh|nine)ty|tens|hundreds?|thousands?|\w*illions?|dozens?|
couple|half|halves|thirds?|quarters?|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|hundred|
thousand|\w+teen|\w+tie|\w+illion)ths?|twice|double|triple|\w+fold|factorial|choose|plus|minus|
negative$|over|mod|modulo|below|under|above|beyond|less|fewer|than|between|up|down|versus|vs|or|and|
nor|not|no|none|nope|never|without|n?either|if|else|unless|when|where|while|but|except|otherwise|
instead|because|is|isn|are|aren|was|wasn|were|do|does|doesn|can|cannot|could|should|would|might|may|
must|won|maybe|too|perhaps|approx|circa|about|around|almost|wrongs?|incorrect|false|invalid|guess|
error|fails?|least|most|\w{3,}ed|\w{5,}ly|impossible|unknown|mistaken|inverse|opposite|reciprocal|
root|power|base|basis|binary|\w*decimal|infinity|imaginary|lakhs?|crores?|gross|score|grand|myriad|
per ?mille|bps|exceeds|onwards|ish|nothing|negative of|bound|plusminus|recurring|unsure|reject"""
CHANGING = re.compile(rf"(?<!\^)(?<!\^-)[0-9]|\b(?:{CHANGING})\b".replace("\n", ""), re.IGNORECASE)
WORD = re.compile(r"[ap]\.m|[^\W\d_]+|\^-?[0-9]+|/")


def read_unit(phrase: str) -> frozenset:
    """Return the units in words with their powers, and nouns with 0: "g/cm^3 of salt" is (g, 1),
    (cm, -3) and (salt, 0). ValueError if a word changes the number before it."""
    if CHANGING.search(phrase):
        raise ValueError(f"no unit: {phrase[:40]}")
    powers = collections.Counter()
    sign = power = 1
    last = None  # the unit before this word
    for word in WORD.findall(phrase):
        name = UNIT.get(word) or UNIT.get(word.casefold())
        if word in ("/", "per"):
            sign = -1
        elif word in ("squared", "cubed") or word[0] == "^":
            if not last:
                raise ValueError("the power of a number")  # 5 squared
            powers[last] *= POWERS[word] if word in POWERS else int(word[1:])
        elif word in POWERS:
            power = POWERS[word]
        else:
            last = name or word.casefold().rstrip("s")
            powers[last] += sign * power if name else 0
            power = 1
    return frozenset(powers.items())


def contradict(units: frozenset, others: frozenset) -> bool:
    """Return whether two quantities with words behind them are of different things."""
    known = {pair for pair in units ^ others if pair[1]}
    nouns = {pair for pair in units if not pair[1]}, {pair for pair in others if not pair[1]}
    return bool(units and others and (known or (all(nouns) and not nouns[0] & nouns[1])))
