"""Chat templates render as transformers renders them, and a broken one is an error that names its folder."""

import pytest
from transformers import PreTrainedTokenizerFast

from lightship.errors import SourceError
from lightship.template import ChatTemplate, load_template
from tests.tiny import tiny_tokenizer

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello\n"}]
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<e>{% endgeneration %}"
    "{% else %}<u>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.mark.parametrize(
    "template",
    [
        MARKED,
        "{% for m in messages %}{{ m['content'] | trim }}{% if loop.last %}{% break %}{% endif %}{% endfor %}",
        "{{ messages | tojson }}",
        "{%- for m in messages %}\n  {{- m.role }}\n{% endfor %}",
    ],
)
@pytest.mark.parametrize("prompt", [True, False])
def test_as_transformers(tmp_path, template, prompt):
    tiny_tokenizer(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    expected = tokenizer.apply_chat_template(
        MESSAGES, chat_template=template, tokenize=False, add_generation_prompt=prompt
    )
    assert ChatTemplate(template, {}).render(MESSAGES, prompt) == expected


def test_a_broken_template_names_its_folder(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(SourceError, match=str(tmp_path)):
        load_template(tmp_path)
