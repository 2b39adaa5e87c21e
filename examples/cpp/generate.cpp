// Generates text with a steered model that `densesteer export-function` wrote: token ids in, token
// ids out, no Python. docs/export-function.md has the signature of the function.

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <iostream>
#include <iterator>
#include <map>
#include <optional>
#include <regex>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "mlx/mlx.h"

namespace mx = mlx::core;

namespace {

constexpr std::string_view usage =
    "usage: generate FILE [--strength X] [--positions all|generated|prompt]\n"
    "                [--max-tokens N] [--eos ID,ID...] [ID...]\n"
    "The ids of the prompt are arguments, or come from standard input; those of the answer go to\n"
    "standard output, one a line. --eos - never stops early.\n";

using Failure = std::runtime_error;

template <typename Number>
Number parse(std::string_view text, std::string_view what) {
  Number value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) {
    throw Failure(std::string(what) + " '" + std::string(text) + "': expected a number.");
  }
  return value;
}

template <>
double parse<double>(std::string_view text, std::string_view what) {  // clang's from_chars lacks it
  std::size_t used = 0;
  try {
    const double value = std::stod(std::string(text), &used);
    if (used == text.size() && std::isfinite(value)) {
      return value;
    }
  } catch (const std::logic_error&) {
  }
  throw Failure(std::string(what) + " '" + std::string(text) + "': expected a finite number.");
}

std::vector<int> parse_ids(const std::string& text) {
  static const std::regex separator("[\\s,]+");
  std::vector<int> ids;
  for (std::sregex_token_iterator it(text.begin(), text.end(), separator, -1), end; it != end; ++it) {
    if (it->length() != 0) {
      ids.push_back(parse<int>(it->str(), "token id"));
    }
  }
  return ids;
}

// The metadata of a function file: flat JSON of numbers, texts and lists of numbers.
class Metadata {
 public:
  explicit Metadata(const std::string& json) {
    static const std::regex entry(
        R"re("(\w+)":\s*(?:"((?:[^"\\]|\\.)*)"|\[([^\]]*)\]|([^\s,}]+)))re");
    for (std::sregex_iterator it(json.begin(), json.end(), entry), end; it != end; ++it) {
      values_[(*it)[1]] = (*it)[2].str() + (*it)[3].str() + (*it)[4].str();
    }
    if (text("format") != "mlx-densesteer function" || text("format_version") != "1") {
      throw Failure("not a file of this program; write one with `densesteer export-function`.");
    }
  }

  std::string text(const std::string& key) const {
    const auto found = values_.find(key);
    return found == values_.end() ? "" : found->second;
  }
  int integer(const std::string& key) const {
    return parse<int>(text(key), key);
  }
  double real(const std::string& key) const {
    return parse<double>(text(key), key);
  }
  std::vector<int> integers(const std::string& key) const {
    return parse_ids(text(key));
  }

 private:
  std::map<std::string, std::string> values_;
};

struct Options {
  std::string file;
  std::string ids;
  std::optional<double> strength;
  std::optional<std::string> positions;
  std::optional<std::vector<int>> eos;
  int max_tokens = 256;
};

Options read_options(std::span<char*> arguments) {
  Options options;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const std::string argument = arguments[i];
    const auto value = [&]() -> std::string {
      if (++i == arguments.size()) {
        throw Failure(argument + " needs a value.\n" + std::string(usage));
      }
      return arguments[i];
    };
    if (argument == "--strength") {
      options.strength = parse<double>(value(), argument);
    } else if (argument == "--positions") {
      options.positions = value();
    } else if (argument == "--max-tokens") {
      options.max_tokens = parse<int>(value(), argument);
      if (options.max_tokens < 1) {
        throw Failure("--max-tokens: expected 1 or more.");
      }
    } else if (argument == "--eos") {
      const auto ids = value();
      options.eos = ids == "-" ? std::vector<int>{} : parse_ids(ids);
    } else if (argument.starts_with("--")) {
      throw Failure("no option " + argument + ".\n" + std::string(usage));
    } else if (options.file.empty()) {
      options.file = argument;
    } else {
      options.ids += argument + " ";
    }
  }
  if (options.file.empty()) {
    throw Failure(std::string(usage));
  }
  if (options.ids.empty()) {
    options.ids.assign(std::istreambuf_iterator<char>(std::cin), {});
  }
  return options;
}

// One sequence: the function, its KV cache, and how many tokens that holds.
class Sequence {
 public:
  Sequence(const mx::ImportedFunction& function, const Metadata& metadata)
      : function_(function),
        chunks_(metadata.integers("chunks")),
        capacity_(metadata.integer("capacity")) {
    auto outputs = function_({});  // metadata, then an empty cache
    cache_.assign(outputs.begin() + 1, outputs.end());
    mx::eval(cache_);
  }

  // Reads tokens, in the longest chunks that the file has; returns the most likely next one.
  int read(std::span<const int> tokens, double strength) {
    if (tokens.size() > static_cast<std::size_t>(capacity_ - position_)) {
      throw Failure(
          "the KV cache is full: it holds " + std::to_string(position_) + " of " +
          std::to_string(capacity_) + " tokens. Export with a larger --capacity.");
    }
    std::optional<mx::array> logits;
    while (!tokens.empty()) {
      const int count = *std::ranges::find_if(  // longest first; the last one is 1
          chunks_, [&](int chunk) { return static_cast<std::size_t>(chunk) <= tokens.size(); });
      logits = step(tokens.first(count), static_cast<float>(strength));
      tokens = tokens.subspan(count);
    }
    // As mlx-lm chooses: in 16 bits the subtraction may make a tie, and the first one wins.
    auto best = mx::argmax(*logits - mx::logsumexp(*logits, -1, true), -1);
    return static_cast<int>(best.item<std::uint32_t>());
  }

 private:
  mx::array step(std::span<const int> tokens, float strength) {
    const int count = static_cast<int>(tokens.size());
    mx::Args inputs{
        mx::array(tokens.data(), {1, count}, mx::int32), mx::array(position_), mx::array(strength)};
    // Moved, so that nobody else holds the old cache: mlx then writes into it in place.
    std::ranges::move(cache_, std::back_inserter(inputs));
    cache_.clear();
    auto outputs = function_(inputs);
    inputs.clear();
    cache_.assign(outputs.begin() + 1, outputs.end());
    mx::eval(outputs);
    position_ += count;
    return outputs.front();
  }

  const mx::ImportedFunction& function_;
  std::vector<int> chunks_;
  int capacity_;
  int position_ = 0;
  std::vector<mx::array> cache_;
};

mx::ImportedFunction load(const std::string& file) {
  if (!std::filesystem::is_regular_file(file)) {
    throw Failure(file + ": no such file.");
  }
  try {
    return mx::import_function(file);
  } catch (const std::exception& error) {
    throw Failure(
        file + ": mlx " + mx::version() + " cannot read it (" + error.what() +
        "). Expected a file that `densesteer export-function` wrote with this release of mlx.");
  }
}

void generate(const Options& options) {
  const auto function = load(options.file);
  const Metadata metadata(function.metadata());

  const double strength = options.strength.value_or(metadata.real("strength"));
  if (std::abs(strength) > metadata.real("largest_strength")) {
    throw Failure("that strength overflows the model's dtype: at most " +
                  metadata.text("largest_strength") + " either way.");
  }
  const auto positions = options.positions.value_or(metadata.text("positions"));
  if (positions != "all" && positions != "generated" && positions != "prompt") {
    throw Failure("positions '" + positions + "': expected all, generated or prompt.");
  }
  const auto eos = options.eos.value_or(metadata.integers("eos"));
  const auto prompt = parse_ids(options.ids);
  const int vocabulary = metadata.integer("vocab_size");
  const int capacity = metadata.integer("capacity");
  if (prompt.empty()) {
    throw Failure("the prompt has no tokens; expected at least one id.");
  }
  for (const int id : prompt) {
    if (id < 0 || id >= vocabulary) {
      throw Failure(
          "token id " + std::to_string(id) + ": expected 0 to " + std::to_string(vocabulary - 1) + ".");
    }
  }
  if (prompt.size() > static_cast<std::size_t>(capacity)) {
    throw Failure(
        "the prompt has " + std::to_string(prompt.size()) + " tokens, but the file's KV cache holds " +
        std::to_string(capacity) + ". Export with a larger --capacity.");
  }

  // The last token of the prompt chooses the first of the answer: it is read by itself.
  Sequence sequence(function, metadata);
  const std::span<const int> beginning(prompt.data(), prompt.size() - 1);
  if (!beginning.empty()) {
    sequence.read(beginning, positions == "generated" ? 0.0 : strength);
  }
  int token = prompt.back();
  for (int made = 0; made < options.max_tokens; ++made) {
    const bool steered = positions != "prompt" || made == 0;
    token = sequence.read({&token, 1}, steered ? strength : 0.0);
    if (std::ranges::find(eos, token) != eos.end()) {
      break;
    }
    std::cout << token << std::endl;
  }
}

} // namespace

int main(int argc, char** argv) {
  try {
    generate(read_options(std::span(argv + 1, static_cast<std::size_t>(argc - 1))));
  } catch (const std::exception& error) {
    std::cerr << "generate: " << error.what() << std::endl;
    return 1;
  }
  return 0;
}
