"""test_includes.py: each C++ source names the headers of the standard library whose names it uses. What another header
brings along differs between versions of the library: what GCC 12 compiles, GCC 13 may not.
"""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ["bench", "data", "flora", "kernels", "model", "parallel", "tests", "train"]


def std(names):
    return rf"\bstd::(?:{names})\b"


def c(names):
    """Functions and macros of C, which need no namespace: no member, no other namespace's."""
    return rf"(?:\bstd::|(?<![\w.>:]))(?:{names})\b"


# header: names that only it is sure to bring.
NAMES = {
    "algorithm": std("sort|stable_sort|min|max|clamp|minmax|min_element|max_element|minmax_element|find|find_if|find_if_not|count|copy|copy_n|"
                     "copy_if|fill|fill_n|any_of|all_of|none_of|count_if|transform|reverse|equal|lower_bound|upper_bound|"
                     "binary_search|remove_if|generate|shuffle|unique|rotate|nth_element|partition|replace|search|for_each|"
                     "swap_ranges|is_sorted|adjacent_find|ranges::\\w+"),
    "array": std("array|to_array"),
    "atomic": std("atomic|atomic_\\w+|memory_order_\\w+"),
    "bit": std("bit_cast|bit_ceil|bit_floor|bit_width|countl_zero|countr_zero|popcount|has_single_bit|rotl|rotr|endian"),
    "cctype": c("isspace|isdigit|isalpha|isalnum|isxdigit|isprint|tolower|toupper") + r"(?=\()",
    "cerrno": r"\berrno\b",
    "cfloat": r"\b(?:FLT|DBL)_\w+",
    "charconv": std("from_chars|to_chars"),
    "chrono": r"\bstd::chrono::",
    "climits": r"\b(?:U?(?:INT|LONG|LLONG|SHRT)_M(?:AX|IN)|PATH_MAX|CHAR_BIT)\b",
    "cmath": std("sqrt|fabs|exp|exp2|expm1|log|log2|log10|log1p|pow|floor|ceil|round|lround|llround|rint|nearbyint|trunc|isfinite|"
                 "isnan|isinf|tanh|tan|sin|cos|erf|hypot|ldexp|frexp|nextafter|copysign|fmod|fma|cbrt"),
    "condition_variable": std("condition_variable"),
    "csignal": c("sigaction|raise|sig_atomic_t|SIGINT|SIGTERM|SIGKILL"),
    "cstdint": r"(?<!\w)u?int(?:8|16|32|64)_t\b|\bu?intptr_t\b|\bU?INT(?:8|16|32|64)_M(?:AX|IN)\b",
    "cstdio": c("printf|fprintf|snprintf|vsnprintf|fopen|fclose|fread|fwrite|fputs|fputc|puts|fflush|FILE|stdout|stderr|perror"),
    "cstdlib": c("getenv|setenv|unsetenv|malloc|calloc|realloc|posix_memalign|aligned_alloc|exit|_Exit|abort|strtol|strtoll|"
                 "strtoul|strtoull|strtod|strtof|mkdtemp|mkstemp|realpath|EXIT_SUCCESS|EXIT_FAILURE"),
    "cstring": c("memcpy|memset|memcmp|memmove|memchr|strlen|strcmp|strncmp|strchr|strstr|strerror|strsignal") + r"(?=\()",
    "deque": std("deque"),
    "exception": std("exception_ptr|current_exception|rethrow_exception|make_exception_ptr|uncaught_exceptions"),
    "filesystem": r"\bstd::filesystem\b",
    "fstream": std("ifstream|ofstream|fstream"),
    "functional": std("function|bind|ref|cref|reference_wrapper|invoke|plus|multiplies|greater"),
    "future": std("async|future|promise"),
    "initializer_list": std("initializer_list"),
    "iomanip": std("setw|setprecision|setfill"),
    "iostream": std("cout|cerr|cin"),
    "iterator": std("back_inserter|istreambuf_iterator|istream_iterator"),
    "limits": std("numeric_limits"),
    "list": std("list"),
    "map": std("map|multimap"),
    "memory": std("unique_ptr|shared_ptr|weak_ptr|make_unique|make_shared"),
    "mutex": std("mutex|lock_guard|unique_lock|scoped_lock|call_once|once_flag"),
    "new": std("bad_alloc|nothrow|align_val_t"),
    "numbers": r"\bstd::numbers::",
    "numeric": std("accumulate|iota|reduce|inner_product|gcd|lcm|partial_sum|exclusive_scan|inclusive_scan"),
    "optional": std("optional|nullopt|make_optional"),
    "queue": std("queue|priority_queue"),
    "random": std("mt19937|mt19937_64|normal_distribution|uniform_\\w+_distribution|random_device|bernoulli_distribution"),
    "regex": std("regex|smatch|regex_\\w+"),
    "set": std("set|multiset"),
    "span": std("span"),
    "sstream": std("ostringstream|istringstream|stringstream"),
    "stdexcept": std("runtime_error|invalid_argument|logic_error|out_of_range|domain_error|length_error"),
    "string": std("string|to_string|stoi|stol|stoll|stoul|stoull|stod|stof|getline"),
    "string_view": std("string_view"),
    "system_error": std("errc|error_code|system_error|system_category|generic_category"),
    "thread": std("thread|jthread|this_thread"),
    "tuple": std("tuple|make_tuple|tie|apply|forward_as_tuple"),
    "type_traits": std("is_\\w+_v|enable_if_t|conditional_t|decay_t|remove_\\w+_t|make_(?:un)?signed_t|underlying_type_t|"
                       "invoke_result_t|is_constant_evaluated"),
    "unordered_map": std("unordered_map"),
    "unordered_set": std("unordered_set"),
    "utility": std("exchange|pair|make_pair|integer_sequence|index_sequence|make_index_sequence|unreachable|as_const"),
    "variant": std("variant|visit|monostate|holds_alternative"),
    "vector": std("vector"),
}
# What these headers bring by the standard, or is the same under a C name.
ALSO = {
    "cstdint": ["stdint.h", "cinttypes"], "cstdlib": ["stdlib.h"], "cstring": ["string.h"], "cstdio": ["stdio.h"],
    "csignal": ["signal.h"], "cmath": ["math.h"], "cerrno": ["errno.h"], "string_view": ["string"],
    "initializer_list": ["vector", "string", "map", "set", "algorithm", "unordered_map", "array"],
    "utility": ["map", "unordered_map", "tuple"], "iterator": ["vector", "string", "map", "set", "array", "string_view"],
    "system_error": ["filesystem", "charconv", "mutex"],
}


def without_text(source):
    """A C++ source without its comments and literals, in which names mean nothing."""
    return re.sub(r'R"(\w*)\((?:.|\n)*?\)\1"|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'|//[^\n]*|/\*(?:.|\n)*?\*/', " ", source)


def includes(source):
    return re.findall(r'^\s*#\s*include\s*<([^>]+)>', source, re.MULTILINE), \
        re.findall(r'^\s*#\s*include\s*"([^"]+)"', source, re.MULTILINE)


def missing_headers(source, read):
    """Headers of NAMES that `source` uses and neither it nor a header of ours that it includes does include; `read` returns
    the text of one of ours, or None."""
    found, seen, queue = set(), set(), [source]
    while queue:
        standard, own = includes(queue.pop())
        found.update(standard)
        for name in own:
            if name not in seen:
                seen.add(name)
                queue.append(read(name) or "")
    code = without_text(re.sub(r"^\s*#\s*include[^\n]*", "", source, flags=re.MULTILINE))
    return [header for header, names in NAMES.items()
            if header not in found and found.isdisjoint(ALSO.get(header, ())) and re.search(names, code)]


def ours(name):
    path = ROOT / name
    return path.read_text() if path.is_file() else None


def sources():
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh")]
    return sorted(str(path.relative_to(ROOT)) for path in [*files, ROOT / "train_gpt2.cu"])


def test_each_source_includes_what_it_uses():
    missing = {name: found for name in sources() if (found := missing_headers((ROOT / name).read_text(), ours))}
    assert not missing, "\n".join(f"{name}: #include <{'>, <'.join(found)}>" for name, found in missing.items())


@pytest.mark.parametrize("source, expected", [
    ("uint32_t x;", ["cstdint"]),
    ("#include <cstdint>\nuint32_t x;", []),
    ('#include "a.h"\nstd::string x;', []),
    ('#include "b.h"\nstd::string x;', ["string"]),
    ('// std::vector\nauto x = "std::map<uint8_t>";', []),
    ("#include <string>\nstd::string_view x;", []),
    ("x.exit(); y::abort();", []),
    ("std::vector<int> x; std::sort(x);", ["algorithm", "vector"]),
])
def test_missing_headers(source, expected):
    headers = {"a.h": '#include "c.h"', "c.h": "#include <string>", "b.h": '#include "b.h"'}
    assert missing_headers(source, headers.get) == expected
