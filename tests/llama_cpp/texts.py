"""Texts of many scripts, digits, spaces, emoji and control characters."""

import random

SENTENCES = [
    *(
        "To be, or not to be: that is the question.",
        "DON'T you'll WE'RE i'm She'd they've it's 'tis",
        "naïve façade coöperate",
    ),
    *("Съешь же ещё этих мягких французских булок", "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία", "שלום עולם, מה שלומך?"),
    *(
        "مرحبا بالعالم ٠١٢٣٤٥٦٧٨٩",
        "नमस्ते दुनिया १२३४५",
        "สวัสดีชาวโลก ๑๒๓",
        "こんにちは世界、カタカナもＡＢＣ１２３",
        "안녕하세요 세계 한글",
    ),
    *("你好，世界！一二三四五", "Xin chào thế giới", "ქართული ენა", "Բարև աշխարհ", "ሰላም ልዑል", "ᎣᏏᏲ", "𝕳𝖊𝖑𝖑𝖔 𝟏𝟐𝟑 𐐷 𠜎"),
    *("1 12 123 1234 12345 1,234.56 0x1F 3.14e-10 ½ ² Ⅷ ①", "def f(x):\n\treturn x ** 2  # done\n\n\n    pass\r\n"),
    *(
        "{'a': [1, 2, {\"b\": null}], };",
        '<html><body class="x">&nbsp;</body></html>',
        "C:\\path\\to\\file  ~/.bashrc $HOME",
    ),
    *(
        "🤷🏽‍♀️👨‍👩‍👧‍👦🇩🇪 ❤️ ☃ ™ ©",
        "e\u0301 a\u0308 \u200b\u200d\u2060\ufeff\u00ad",
        "<|im_start|>user\nHo<|im_end|><|endoftext|><|pad|>",
    ),
    *(
        "a\u00a0b\u2003c\u3000d\u2028e\u2029f\u0085g",
        "tab\tnew\nfeed\x0ccr\rnul\x00bell\x07esc\x1bdel\x7f",
        "«» “” ‘’ … — – ¿¡",
    ),
]
PIECES = [
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    " \n ",
    "",
    "",
    ".",
    ",",
    "!?",
    "'s",
    "'S",
    "'LL",
    "-",
    "_",
    "9",
    "99",
    "9999",
]


def texts(count: int) -> list[str]:
    """Texts of the pieces above, and of characters drawn from all of Unicode."""
    draw = random.Random(0)
    made = [*SENTENCES, *PIECES]
    while len(made) < count:
        parts: list[str] = []
        for _ in range(draw.randint(1, 8)):
            sentence = draw.choice(SENTENCES)
            start = draw.randrange(len(sentence))
            parts += [sentence[start : start + draw.randint(1, 30)], draw.choice(PIECES)]
            if draw.random() < 0.3:
                # Not the surrogates, which UTF-8 can't hold.
                parts.append(chr(draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)])))
        made.append("".join(parts))
    return made
