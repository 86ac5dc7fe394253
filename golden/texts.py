"""Texts that break tokenizers: spaces, line ends, scripts, emoji, numbers, names of special tokens."""

import numpy as np

SPACES = [
    "", " ", "  ", "   ", "    ", " a", "  a", "   a", "a ", "a  ", "a   b", " a b ", "\t",
    "\t\t", "\ta", "a\tb", " \t ", "\n", "\n\n", "\n\n\n", " \n", "\n ", " \n ", "\n  \n", "a\n",
    "\na", "a\nb", "a\n\nb", "a \n b", "a\r\nb", "\r", "\r\n\r\n", "a\n\n\n  b", "x\n \n \n",
    "a\u00a0b", "a\u2003b", "\u3000a", "a\u200bb", "\ufeffa", "a\x0bb", "a\x0cb", "\u2028",
    "a\u0085b", "1  2   3    4     5", "end.   ", "tabs\t\tand  spaces \t mixed",
]  # fmt: skip
WORDS = [
    "Hello", "Hello world", " Hello World!", "HELLO", "hElLo wOrLd", "the cat sat on the mat",
    "antidisestablishment", "don't", "I'm we've they'll he'd she's you're it's",
    "DON'T I'M WE'VE", "rock 'n' roll", "'s", "'S 'T 'LL", "''", "o\u2019clock",
    "snake_case camelCase PascalCase kebab-case", "a_b", "__init__", "_", "___", "e.g. i.e. etc.",
    "naïve café", "nai\u0308ve cafe\u0301", "Straße ÄÖÜ", "œuvre", "ﬁ ligature", "I\u0307", "ǅ",
    "x²+y³", "½ ¼", "№ 5",
    "A long sentence, which goes on; and on: until it stops - at last (nearly) [here] {there} <now>.",
]  # fmt: skip
NUMBERS = [
    "0", "7", "42", "123", "1234", "12345", "123456789", "1234567890123", "3.14159", "-1", "+1",
    "1,000,000", "1e-05", "0x1F", "10%", "$9.99", "2026-11-22", "12:34:56", "v1.6", "1st 2nd 3rd",
    "a1b2c3", "abc123def", "007", "\u0661\u0662\u0663", "\uff11\uff12", "\u2460", "\u2167",
    "\u0967\u0968", "1\u20442", "3x4=12",
]  # fmt: skip
SIGNS = [
    "!", "!!", "!!!!", "?!", "...", "…", ". . .", "--", "—", "–", "-->", "->", "==", "!=", ">=",
    "&&", "||", "//", "/* c */", "# title", "###", "## a\n### b", "`code`",
    "```python\nprint('hi')\n```", "a=b", "f(x)", "x[0]", "{}", "<br/>", "</div>", "&amp;",
    "C:\\dir\\file", "/usr/bin/env", "name@example.com", "#tag @user", "\\", "\\n", '"', "'",
    "“quoted”", "«guillemets»", "¿Qué?", "€ £ ¥", "• item", "a…b", "~^|", "$$x$$", " !", " ?",
    "\u2581", "a\u2581b", "\u2581\u2581", " \u2581 ", "\u0120", "\u010a",
]  # fmt: skip
SCRIPTS = [
    "你好", "你好，世界！", "图片里有什么？", "日本語のテキスト", "ひらがなカタカナ", "한국어 텍스트",
    "Привет, мир", "нещо на български", "Ελληνικά", "עברית", "العربية", "हिन्दी", "ไทย", "ខ្មែរ", "தமிழ்",
    "አማርኛ", "Tiếng Việt", "a你b好c", "你 好", "中文 and English 混合 123", "\U00020000",
    "\U0001d400\U0001d401", "ﷺ", "က", "ქართული",
]  # fmt: skip
EMOJI = [
    "🙂", "🦙", "🙂🙂", " 🙂", "a🙂b", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇫🇷", "❤️", "☃", "✓ ✗", "→ ←",
    "🙂 text 🦙 text", "©®™",
]  # fmt: skip
CONTROLS = ["\x00", "a\x00b", "\x01", "\x1b[0m", "\x7f", "\u0080", "\u00ad", "\u202e", "\uffff", "\ufffd"]
CONTROLS += ["\U0010ffff"]
SPECIAL = [
    "<s>", "</s>", "<unk>", "<pad>", "a<s>b", "a</s>", "</s> a", "<s> </s>", "<0x0A>", "<0x41>",
    "<image>", "a<image>b", "<|endoftext|>",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "<|eot_id|>", "<|begin_of_text|>a",
    "[INST] hi [/INST]", "<<SYS>>\nx\n<</SYS>>", "<|im_end|> <|im_end|>", "<|", "|>", "<s", "s>",
    "< s >", "USER: hi\nASSISTANT:", "USER: hi ASSISTANT: yes</s>USER: more ASSISTANT:",
    "### Human: a\n### Assistant:", "<fim_prefix>", "<|file_sep|>", "<reponame>",
    "<｜begin▁of▁sentence｜>", "<|start_header_id|>user<|end_header_id|>",
]  # fmt: skip

GROUPS = [SPACES, WORDS, NUMBERS, SIGNS, SCRIPTS, EMOJI, CONTROLS, SPECIAL]


def nasty_texts(n_mixed: int = 60) -> list[str]:
    """Every text above, then `n_mixed` that join two to five of them, with or without spaces between."""
    texts = [text for group in GROUPS for text in group]
    random = np.random.RandomState(11)  # frozen by NEP 19
    for _ in range(n_mixed):
        chosen = random.randint(0, len(texts), random.randint(2, 6))
        joint = ["", " ", "\n"][random.randint(3)]
        texts.append(joint.join(texts[i] for i in chosen))
    return list(dict.fromkeys(texts))
