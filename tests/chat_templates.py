"""Chat templates of the three families of tool calls, written for the tests: the same form, other words."""

HERMES = """
{%- if tools %}
{{- '<|system|>Functions:\\n' }}
{%- for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}
{{- 'Write <tool_call>\\n{"name": <name>, "arguments": <object>}\\n</tool_call> to call one.<|end|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|user|><tool_response>\\n' + message.content + '\\n</tool_response><|end|>' }}
    {%- elif message.tool_calls %}
        {{- '<|assistant|>' + message.content }}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{ '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|end|>' }}
    {%- else %}
        {{- '<|' + message.role + '|>' + message.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""

LLAMA3 = """
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- for message in messages %}
    {%- if loop.first and tools is not none %}
        {{- '<|user|>Functions, to be called as {"name": name, "parameters": object}:\\n' }}
        {%- for tool in tools %}{{ tool | tojson(indent=4) }}{{ '\\n\\n' }}{% endfor %}
        {{- message.content | trim + '<|end|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('This model calls one function at a time!') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|assistant|>{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}{{ '}<|end|>' }}
    {%- elif message.role == 'tool' %}
        {{- '<|user|>' }}{{ message.content | tojson }}{{ '<|end|>' }}
    {%- else %}
        {{- '<|' + message.role + '|>' + message.content | trim + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""

MISTRAL = """
{%- set asked = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools is defined and tools is not none and message == asked[-1] %}
            {{- '[AVAILABLE_TOOLS] ' }}{{ tools | tojson }}{{ '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + message.content + '[/INST]' }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {%- if call.id | length != 9 %}{{ raise_exception('Ids have 9 characters!') }}{% endif %}
            {%- set written = call.function | tojson %}
            {{- written[:-1] + ', "id": "' + call.id + '"}' }}{{ ', ' if not loop.last }}
        {%- endfor %}
        {{- ']<|end|>' }}
    {%- elif message.role == 'tool' %}
        {%- if message.tool_call_id | length != 9 %}{{ raise_exception('Ids have 9 characters!') }}{% endif %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content + ', "call_id": "' + message.tool_call_id }}
        {{- '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- ' ' + message.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
"""

FAMILIES = {"hermes": HERMES, "llama3": LLAMA3, "mistral": MISTRAL}
