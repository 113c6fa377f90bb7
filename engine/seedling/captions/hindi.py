"""Hindi. Machine-made and easy to correct: one table for each kind of word. Native speakers are welcome.

Adjectives in -ā agree in gender, number and case (नीला, नीली, नीले), all others stay (लाल). Nouns are given with their
direct plural and their oblique singular, which stands before के and its kin.
"""

from engine.seedling.captions.core import Language, Noun


def agree(adjective: str, gender: str, form: str) -> str:
    """नीला: f नीली, m plural or oblique नीले."""
    if not adjective.endswith("ा"):
        return adjective
    if gender == "f":
        return adjective[:-1] + "ी"
    return adjective if form == "one" else adjective[:-1] + "े"


def _m(one: str, many: str = "") -> Noun:
    """Masculine; the oblique singular is like the direct plural."""
    return Noun(one, many or one, many, "", "m")


def _f(one: str, many: str) -> Noun:
    """Feminine; the oblique singular is like the direct."""
    return Noun(one, many, "", "", "f")


NAMES = {
    "circle": (_m("वृत्त"), _m("गोला", "गोले")),
    "square": (_m("वर्ग"), _m("चौकोर")),
    "triangle": (_m("त्रिभुज"), _m("त्रिकोण")),
    "ring": (_m("छल्ला", "छल्ले"), _m("वलय")),
    "pine": (_m("चीड़"), _m("चीड़ का पेड़", "चीड़ के पेड़")),
    "maple": (_m("मेपल का पत्ता", "मेपल के पत्ते"), _m("मेपल")),
    "cherry": (_m("चेरी का फूल", "चेरी के फूल"),),
    "bamboo": (_m("बाँस"), _m("बांस")),
    "moon": (_m("चाँद"), _m("चांद"), _m("चंद्रमा")),
    "sun": (_m("सूरज"), _m("सूरज"), _m("सूर्य")),
    "mountain": (_m("पहाड़"), _m("पहाड़"), _m("पर्वत")),
    "lantern": (_f("लालटेन", "लालटेनें"), _f("लालटेन", "लालटेनें"), _f("कंदील", "कंदीलें")),
    "boat": (_f("नाव", "नावें"), _f("नाव", "नावें"), _f("नौका", "नौकाएँ")),
    "crane": (_m("सारस"),),
    "koi": (_f("कोई मछली", "कोई मछलियाँ"), _f("कार्प मछली", "कार्प मछलियाँ")),
    "bridge": (_m("पुल"), _m("पुल"), _m("सेतु")),
    "rock": (_f("चट्टान", "चट्टानें"), _m("पत्थर")),
    "gate": (_m("तोरण"), _m("तोरण द्वार"), _m("द्वार")),
    "pagoda": (_m("पगोडा", "पगोडे"), _m("पैगोडा", "पैगोडे")),
    "umbrella": (_m("छाता", "छाते"), _f("छतरी", "छतरियाँ")),
}
HINDI = Language(
    frames=(
        *("{}",) * 7, "{} बनाओ", "{} बनाइए", "{} दिखाओ", "मुझे {} दिखाओ", "मुझे {} चाहिए", "कृपया {} बनाएँ", "मुझे {} दिखाएँ",
        "चित्र में {}", "एक चित्र जिसमें {}", "एक तस्वीर जिसमें {}", "तस्वीर में {}", "चित्र: {}",
    ),
    held_out_frames=(
        "कृपया {} दिखाएँ", "एक तस्वीर बनाओ जिसमें {}", "मुझे चित्र में {} चाहिए", "मुझे तस्वीर में {} दिखाओ", "एक चित्र में {}",
        "तस्वीर: {}",
    ),
    names=NAMES,
    colors={
        "red": ("लाल",), "orange": ("नारंगी",), "yellow": ("पीला",), "green": ("हरा",), "blue": ("नीला",),
        "purple": ("बैंगनी", "बैंगनी", "जामुनी"), "pink": ("गुलाबी",), "black": ("काला",), "white": ("सफ़ेद", "सफेद"),
        "gray": ("स्लेटी", "स्लेटी", "धूसर"),
    },
    one=("एक", "एक", "एक", ""),
    numbers={2: ("दो", "दो", "दो", "2", "२"), 3: ("तीन", "तीन", "तीन", "3", "३"), 4: ("चार", "चार", "चार", "4", "४")},
    between={
        "and": ("{a} और {b}", "{a} और {b}", "{a} तथा {b}", "{b bound} के पास {a}", "{b bound} के बगल में {a}", "{a}, {b}"),
        "left of": (
            "{b bound} के बाईं ओर {a}", "{b bound} के बाईं ओर {a}", "{b bound} की बाईं तरफ़ {a}", "{b bound} के बाएँ {a}",
            "बाईं ओर {a} और दाईं ओर {b}", "{a}, {b bound} के बाईं ओर",
        ),
        "right of": (
            "{b bound} के दाईं ओर {a}", "{b bound} के दाईं ओर {a}", "{b bound} की दाईं तरफ़ {a}", "{b bound} के दाएँ {a}",
            "दाईं ओर {a} और बाईं ओर {b}", "{a}, {b bound} के दाईं ओर",
        ),
        "above": ("{b bound} के ऊपर {a}", "{b bound} के ऊपर {a}", "ऊपर {a} और नीचे {b}", "{a}, {b bound} के ऊपर"),
        "below": ("{b bound} के नीचे {a}", "{b bound} के नीचे {a}", "नीचे {a} और ऊपर {b}", "{a}, {b bound} के नीचे"),
    },
    papers=(
        *(("{c} पृष्ठभूमि पर {x}", "f", "bound"),) * 3, ("{c} बैकग्राउंड पर {x}", "m", "bound"),
        ("{c} काग़ज़ पर {x}", "m", "bound"), ("{x}, {c} पृष्ठभूमि", "f", "one"), ("{x}, {c} पृष्ठभूमि पर", "f", "bound"),
    ),
    sides=("{p} {x}", "{p} {x}", "{p} {x}", "{x}, {p}"),
    times={
        "dawn": ("भोर में", "भोर में", "सुबह"), "day": ("दिन में",), "dusk": ("शाम को", "शाम में"),
        "night": ("रात में", "रात को"),
    },
    seasons={
        "spring": ("वसंत में", "वसंत ऋतु में", "बसंत में"), "summer": ("गर्मी में", "गर्मियों में"),
        "autumn": ("पतझड़ में", "पतझड़ में", "शरद ऋतु में"), "winter": ("सर्दी में", "सर्दियों में"),
    },
    weathers={"rain": ("बारिश में", "बारिश में", "वर्षा में"), "snow": ("बर्फ़बारी में", "गिरती बर्फ़ में")},
    clauses={"rain": ("बारिश हो रही है",), "snow": ("बर्फ़ गिर रही है",)},
    tags={
        "dawn": "भोर", "day": "दिन", "dusk": "शाम", "night": "रात", "spring": "वसंत", "summer": "गर्मी",
        "autumn": "पतझड़", "winter": "सर्दी", "rain": "बारिश", "snow": "बर्फ़",
    },
    attributive={"spring": "वसंत का", "summer": "गर्मियों का", "autumn": "पतझड़ का", "winter": "सर्दियों का"},
    evenings={"dawn": ("भोर में", "f"), "day": ("दिन में", "m"), "dusk": ("शाम को", "f"), "night": ("रात में", "f")},
    agree=agree,
)  # fmt: skip
