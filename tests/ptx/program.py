"""Parser of PTX as NVVM writes it: instructions, registers, labels, variables."""
import re
from typing import NamedTuple

REGISTERS = {"pred": "b1", "b16": "u2", "b32": "u4", "b64": "u8", "f32": "f4", "f64": "f8"}      # declared type -> numpy dtype


class Instruction(NamedTuple):
    """One PTX instruction."""
    opcode: tuple       # with its modifiers: ("ld", "global", "v4", "u32")
    operands: tuple     # as they are written: ("{%r1,%r2}", "[%rd1+16]")
    predicate: str      # "%p1" or "!%p1"; "" if there is none
    line: int


class Variable(NamedTuple):
    """An array of the module."""
    space: str          # state space: "shared", "global" or "local"
    align: int
    size: int           # bytes; 0: as many as a launch asks for
    values: bytes       # its first bytes, if it is initialized


class Program(NamedTuple):
    """One kernel."""
    name: str
    parameters: dict    # name -> type, in order
    registers: dict     # "%rd" -> numpy dtype
    variables: dict     # name -> Variable
    labels: dict        # name -> index of an instruction
    code: list


def split_operands(text):
    """Split operands at the commas that are in no brackets."""
    parts, depth, part = [], 0, ""
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += c
    if part.strip():
        parts.append(part.strip())
    return tuple(parts)


def _variable(text):
    """Parse a declaration without its semicolon: name, Variable."""
    space = re.search(r"\.(shared|global|local|const)\b", text)[1]
    align = int((re.search(r"\.align (\d+)", text) or [0, 1])[1])
    kind, name, many, count = re.search(r"\.[bufs](\d+)\s+([\w$]+)(\[(\d*)\])?", text).groups()
    values = [int(v, 0) for v in text.partition("{")[2].rstrip("}").split(",")] if "{" in text else []
    n_bytes = int(kind) // 8
    return name, Variable(space, align, n_bytes * (int(count or 0) if many else 1), b"".join(v.to_bytes(n_bytes, "little") for v in values))


def _scoped(label, scopes):
    """A label's name, with the numbers of the pairs of braces around it."""
    return "@".join([label, *map(str, scopes[1:])])


def parse(text):
    """Parse a module with one kernel into a Program.

    Functions that it calls are left out: executing a call is an error.
    """
    lines = [line.partition("//")[0].strip() for line in text.splitlines()]
    start = next(i for i, line in enumerate(lines) if ".entry" in line)
    variables = dict(_variable(line[:-1]) for line in lines if re.match(r"(\.\w+ )*\.(shared|global|local|const) \.align", line)
                     and line.endswith(";") and (".extern" not in line or ".shared" in line))
    name = re.search(r"\.entry ([\w$]+)", lines[start])[1]
    parameters, registers, labels, code, scopes, n_scopes = {}, {}, {}, [], [], 0
    at = start + 1
    while lines[at] != "{":
        found = re.match(r"\.param \.(\w+) ([\w$]+)", lines[at])
        if found:
            parameters[found[2]] = found[1]
        at += 1
    statement, depth = "", 0
    for number in range(at, len(lines)):
        line = lines[number]
        if line in ("", "{", "}"):
            depth += (line == "{") - (line == "}")
            if depth == 0:
                break
            if line:
                scopes, n_scopes = (scopes + [n_scopes], n_scopes + 1) if line == "{" else (scopes[:-1], n_scopes)
            continue
        if not statement and re.fullmatch(r"[\w$]+:", line):
            labels[_scoped(line[:-1], scopes)] = len(code)
            continue
        statement += line + " "
        if not line.endswith(";"):
            continue
        statement, done = "", statement.strip().rstrip(";").strip()
        declared = re.match(r"\.reg \.(\w+)\s+(%\w+)", done)      # many, %r<9>, or one; another pair of braces may declare it again
        if declared:
            assert registers.setdefault(declared[2], REGISTERS[declared[1]]) == REGISTERS[declared[1]]
        elif re.match(r"\.local", done):
            variables.update([_variable(done)])
        elif done and not done.startswith("."):
            found = re.match(r"(?:@(!?%\w+)\s+)?(\S+)\s*(.*)", done)
            code.append(Instruction(tuple(found[2].split(".")), split_operands(found[3]), found[1] or "", number + 1))
            if code[-1].opcode[0] == "bra":
                code[-1] = code[-1]._replace(operands=tuple(_scoped(found[3].strip(), scopes[:n]) for n in range(len(scopes), -1, -1)))
    code = [i._replace(operands=(next(o for o in i.operands if o in labels),)) if i.opcode[0] == "bra" else i for i in code]
    return Program(name, parameters, registers, variables, labels, code)
