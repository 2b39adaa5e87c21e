// Generates text with a steered model that `densesteer export-function` wrote: token ids in, token
// ids out, no Python. docs/export-function.md has the signature of the function.

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <iostream>
#include <iterator>
#include <limits>
#include <map>
#include <optional>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "mlx/mlx.h"

namespace mx = mlx::core;

namespace {

constexpr std::string_view usage =
    "usage: generate FILE [--strength X] [--positions all|generated|prompt|first:N]\n"
    "                [--max-tokens N] [--eos ID,ID...] [ID...]\n"
    "The ids of the prompt are arguments, or come from standard input; those of the answer go to\n"
    "standard output, one a line. --eos - never stops early. -h prints this.\n";

using Failure = std::runtime_error;

std::string quote(std::string_view text) {
  return "'" + std::string(text.substr(0, 40)) + (text.size() > 40 ? "...'" : "'");
}

int parse_integer(std::string_view text, const std::string& what) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) {
    throw Failure(what + " " + quote(text) + ": expected a whole number, of 32 bits at most.");
  }
  return value;
}

double parse_real(const std::string& text, const std::string& what) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);  // clang's from_chars lacks double
  if (text.empty() || end != text.c_str() + text.size() || !std::isfinite(value)) {
    throw Failure(what + " " + quote(text) + ": expected a finite number.");
  }
  return value;
}

std::vector<int> parse_ids(std::string text) {
  std::ranges::replace(text, ',', ' ');
  std::istringstream words(text);
  std::vector<int> ids;
  for (std::string word; words >> word;) {
    ids.push_back(parse_integer(word, "token id"));
  }
  return ids;
}

// Takes a JSON text, which `json` begins with, away from it; escapes are left as they are.
std::string take_text(std::string_view& json) {
  std::size_t end = 1;
  while (end < json.size() && json[end] != '"') {
    end += json[end] == '\\' ? 2 : 1;
  }
  if (end >= json.size()) {
    throw Failure("the file's metadata ends within a text.");
  }
  const std::string text(json.substr(1, end - 1));
  json.remove_prefix(end + 1);
  return text;
}

// The metadata of a function file: flat JSON of numbers, texts and lists of numbers.
class Metadata {
 public:
  explicit Metadata(std::string_view json) {
    const auto skip_to = [&](std::size_t at) { json.remove_prefix(std::min(at, json.size())); };
    for (skip_to(json.find('"')); !json.empty(); skip_to(json.find('"'))) {
      auto& value = values_[take_text(json)];
      skip_to(json.find_first_not_of(": "));
      if (json.starts_with('"')) {
        value = take_text(json);
      } else {
        const bool list = json.starts_with('[');
        const auto end = json.find_first_of(list ? "]" : ",} \n");
        value = json.substr(list, end - list);
        skip_to(end);
      }
    }
    if (text("format") != "mlx-densesteer function" || text("format_version") != "1") {
      throw Failure("is no function file. Write one with `densesteer export-function`.");
    }
  }

  std::string text(const std::string& key) const {
    const auto found = values_.find(key);
    return found == values_.end() ? "" : found->second;
  }
  int integer(const std::string& key) const {
    return parse_integer(text(key), key);
  }
  double real(const std::string& key) const {
    return parse_real(text(key), key);
  }
  std::vector<int> integers(const std::string& key) const {
    return parse_ids(text(key));
  }

 private:
  std::map<std::string, std::string> values_;
};

// Which tokens are steered: those before the prompt's last one or none of them, and so many from it on.
struct Steered {
  bool prompt = true;
  int tokens = std::numeric_limits<int>::max();
};

Steered parse_positions(const std::string& text) {
  constexpr std::string_view first = "first:";
  if (text == "all") {
    return {};
  }
  if (text == "generated") {
    return {.prompt = false};
  }
  if (text == "prompt") {
    return {.tokens = 1};
  }
  if (text.starts_with(first)) {
    const int tokens = parse_integer(text.substr(first.size()), "positions first:");
    if (tokens > 0) {
      return {.prompt = false, .tokens = tokens};
    }
  }
  throw Failure("positions " + quote(text) + ": expected all, generated, prompt or first:N, N from 1 on.");
}

struct Options {
  bool help = false;
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
    if (argument == "-h" || argument == "--help") {
      options.help = true;
      return options;
    }
    if (argument == "--strength") {
      options.strength = parse_real(value(), argument);
    } else if (argument == "--positions") {
      options.positions = value();
    } else if (argument == "--max-tokens") {
      options.max_tokens = parse_integer(value(), argument);
      if (options.max_tokens < 1) {
        throw Failure("--max-tokens: expected 1 or more.");
      }
    } else if (argument == "--eos") {
      const auto ids = value();
      options.eos = ids == "-" ? std::vector<int>{} : parse_ids(ids);
    } else if (argument.starts_with('-') && !std::isdigit(static_cast<unsigned char>(argument[1]))) {
      throw Failure("no option " + quote(argument) + ".\n" + std::string(usage));
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
    if (capacity_ < 1 || chunks_.empty() || chunks_.back() != 1 || std::ranges::min(chunks_) < 1) {
      throw Failure("the file is damaged: capacity " + quote(metadata.text("capacity")) + ", chunks " +
                    quote(metadata.text("chunks")) + "; expected lengths of which the last is 1.");
    }
    auto outputs = function_({});  // metadata, then an empty cache
    cache_.assign(outputs.begin() + 1, outputs.end());
    mx::eval(cache_);
  }
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;

  // Waits for what `next` enqueued and nobody read: a program that returns from `main` while MLX
  // computes may crash.
  ~Sequence() {
    try {
      mx::synchronize();
    } catch (const std::exception&) {  // a failure of what nobody reads
    }
  }

  bool full() const {
    return position_ == capacity_;
  }

  // Reads ids, in the longest chunks that the file has.
  void read(std::span<const int> ids, double strength) {
    while (!ids.empty()) {
      const int count = *std::ranges::find_if(  // longest first; the last one is 1
          chunks_, [&](int chunk) { return static_cast<std::size_t>(chunk) <= ids.size(); });
      step(mx::array(ids.data(), {1, count}, mx::int32), strength);
      mx::eval(cache_);
      ids = ids.subspan(count);
    }
  }

  // Reads one token, int32 (1, 1), and enqueues the most likely next one, which is returned. Neither
  // has to be computed yet: so the GPU goes on while the program writes the token before.
  mx::array next(const mx::array& token, double strength) {
    const auto logits = step(token, strength);
    // As mlx-lm chooses: in 16 bits the subtraction may make a tie, and the first one wins.
    const auto best = mx::argmax(logits - mx::logsumexp(logits, -1, true), -1, true);
    auto enqueued = cache_;
    enqueued.push_back(mx::astype(best, mx::int32));
    mx::async_eval(enqueued);
    return enqueued.back();
  }

 private:
  // Returns the logits after the last of the tokens; they and the cache are still to be computed.
  mx::array step(const mx::array& tokens, double strength) {
    const int count = tokens.shape(1);
    if (count > capacity_ - position_) {
      throw Failure(
          "the KV cache is full: it holds " + std::to_string(position_) + " of " +
          std::to_string(capacity_) + " tokens. Export with a larger --capacity.");
    }
    mx::Args inputs{tokens, mx::array(position_), mx::array(static_cast<float>(strength))};
    // Moved, so that the function alone holds the old cache: mlx then writes into it in place.
    std::ranges::move(cache_, std::back_inserter(inputs));
    cache_.clear();
    auto outputs = function_(inputs);
    cache_.assign(outputs.begin() + 1, outputs.end());
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

void print(std::string_view text) {
  if (!(std::cout << text << std::flush)) {
    throw Failure("standard output cannot be written; the rest of the answer is lost.");
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
  const double dose = std::abs(strength) * metadata.real("dose_per_strength");
  if (dose >= metadata.real("large_dose")) {
    std::cerr << "generate: warning: a large dose, " << 100 * dose << "% of the residual stream: "
              << "the text may repeat itself or make no sense. Try a smaller --strength.\n";
  }
  const auto steered = parse_positions(options.positions.value_or(metadata.text("positions")));
  const auto strength_at = [&](int answered) { return answered < steered.tokens ? strength : 0.0; };
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
  sequence.read(std::span(prompt).first(prompt.size() - 1), steered.prompt ? strength : 0.0);
  auto token = sequence.next(mx::array(&prompt.back(), {1, 1}, mx::int32), strength_at(0));
  for (int made = 1;; ++made) {
    std::optional<mx::array> following;
    if (made < options.max_tokens && !sequence.full()) {
      following = sequence.next(token, strength_at(made));
    }
    const int id = token.item<int>();
    if (std::ranges::find(eos, id) != eos.end()) {
      break;
    }
    print(std::to_string(id) + "\n");
    if (made == options.max_tokens) {
      break;
    }
    token = following ? *following : sequence.next(token, strength_at(made));  // raises: the cache is full
  }
}

} // namespace

int main(int argc, char** argv) {
  try {
    const auto options = read_options(std::span(argv, argc).subspan(1));
    if (options.help) {
      print(usage);
    } else {
      generate(options);
    }
  } catch (const std::exception& error) {
    std::cerr << "generate: " << error.what() << std::endl;
    return 1;
  }
  return 0;
}
