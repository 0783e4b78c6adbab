#include <pybind11/native_enum.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "arrays.hpp"
#include "tercet/forest.hpp"
#include "tercet/snapshot.hpp"

namespace py = pybind11;
using namespace py::literals;
using tercet::BadTicket;
using tercet::Counters;
using tercet::Forest;
using tercet::ForestConfig;
using tercet::Leaves;
using tercet::Snapshot;
using tercet::TreeColumns;
using tercet::TreeStatus;

namespace {

// A forest whose calls release the GIL and take turns: one beside another is refused, since both
// would break its memory.  Counters are those after the last call, for any thread at any time.
class Guarded {
 public:
  explicit Guarded(Forest forest)
      : forest_(std::move(forest)),
        num_channels_(forest_.config().backup.channels.size()),
        counters_(forest_.counters()) {}

  template <typename Use>
  auto in_turn(const Use& use) {
    if (busy_.exchange(true)) {
      throw std::logic_error(
          "Forest: another thread is in a call of this forest; hold a lock, or give each thread "
          "its own");
    }
    const Turn turn{*this};
    const py::gil_scoped_release released;
    return use(forest_);
  }

  [[nodiscard]] std::size_t num_channels() const { return num_channels_; }

  Counters counters() {
    const std::scoped_lock lock(mutex_);
    return counters_;
  }

 private:
  struct Turn {
    Guarded& guarded;
    ~Turn() {
      guarded.publish();
      guarded.busy_ = false;
    }
  };

  void publish() {
    if (!forest_.is_whole()) return;
    const std::scoped_lock lock(mutex_);
    counters_ = forest_.counters();
  }

  Forest forest_;
  std::size_t num_channels_;
  std::atomic<bool> busy_{false};
  std::mutex mutex_;
  Counters counters_;
};

template <typename Result, typename... Args>
auto in_turn(Result (Forest::*method)(Args...)) {
  return [method](Guarded& guarded, Args... args) {
    return guarded.in_turn([&](Forest& forest) { return (forest.*method)(args...); });
  };
}

template <typename Result, typename... Args>
auto in_turn(Result (Forest::*method)(Args...) const) {
  return [method](Guarded& guarded, Args... args) {
    return guarded.in_turn([&](const Forest& forest) { return (forest.*method)(args...); });
  };
}

// A read-only view of a column, which keeps its owner alive.
template <typename Owner, typename T>
auto column(std::vector<T> Owner::* which) {
  return [which](const py::object& self) {
    const std::vector<T>& values = self.cast<const Owner&>().*which;
    py::array_t<T> view(static_cast<py::ssize_t>(values.size()), values.data(), self);
    view.attr("flags").attr("writeable") = false;
    return view;
  };
}

using Optional = std::optional<py::array>;

// None, or one element for each of `n`; whether they are as many is checked with the rest.
template <typename T>
std::span<const T> row_or_none(const Optional& array, std::size_t n, const char* op,
                               const char* name) {
  if (!array) return {};
  const auto elements = row<T>(*array, op, name);
  if (!elements.empty() || n == 0) return elements;
  throw py::value_error(std::string(op) + ": " + name + " must have " + std::to_string(n) +
                        " elements, got " + std::to_string(elements.size()));
}

// None, or one row of so many elements for each of `n`.
std::span<const double> table_or_none(const Optional& array, std::size_t n, std::size_t columns,
                                      const char* op, const char* name) {
  if (!array) return {};
  const auto all = elements<double>(*array, op, name);
  if (array->ndim() == 2 && static_cast<std::size_t>(array->shape(0)) == n &&
      static_cast<std::size_t>(array->shape(1)) == columns) {
    return all;
  }
  throw py::value_error(std::string(op) + ": " + name + " must have shape (" + std::to_string(n) +
                        ", " + std::to_string(columns) + "), got " +
                        std::string(py::str(array->attr("shape"))));
}

// What may come with children.
void add_children(tercet::Results& results, const char* op, const py::array& num_children,
                  const py::array& handles, const Optional& priors, const Optional& terminal) {
  results.num_children = row<std::uint32_t>(num_children, op, "num_children");
  results.handles = row<std::int64_t>(handles, op, "handles");
  const std::size_t children = results.handles.size();
  results.priors = row_or_none<float>(priors, children, op, "priors");
  const auto ends = row_or_none<bool>(terminal, children, op, "terminal");
  results.terminal = {reinterpret_cast<const std::uint8_t*>(ends.data()), ends.size()};
}

// What may come with values.
void add_values(tercet::Results& results, const Guarded& guarded, const char* op,
                const py::array& values, const Optional& outcomes, const Optional& channels) {
  const std::size_t n = results.tickets.size();
  results.values = row<double>(values, op, "values");
  results.outcomes = row_or_none<double>(outcomes, n, op, "outcomes");
  results.channels = table_or_none(channels, n, guarded.num_channels(), op, "channels");
}

std::span<const double> costs_of(const Optional& costs, std::size_t n, const char* op) {
  return table_or_none(costs, n, 4, op, "costs");
}

void tell(Guarded& guarded, const py::array& tickets, const py::array& values,
          const py::array& num_children, const py::array& handles, const Optional& priors,
          const Optional& terminal, const Optional& outcomes, const Optional& channels,
          const Optional& costs) {
  tercet::Results results;
  results.tickets = row<tercet::Ticket>(tickets, "tell", "tickets");
  add_values(results, guarded, "tell", values, outcomes, channels);
  add_children(results, "tell", num_children, handles, priors, terminal);
  results.costs = costs_of(costs, results.tickets.size(), "tell");
  guarded.in_turn([&](Forest& forest) { forest.tell(results); });
}

void tell_children(Guarded& guarded, const py::array& tickets, const py::array& num_children,
                   const py::array& handles, const Optional& priors, const Optional& terminal,
                   const Optional& costs) {
  tercet::Results results;
  results.tickets = row<tercet::Ticket>(tickets, "tell_children", "tickets");
  add_children(results, "tell_children", num_children, handles, priors, terminal);
  results.costs = costs_of(costs, results.tickets.size(), "tell_children");
  guarded.in_turn([&](Forest& forest) { forest.tell_children(results); });
}

void tell_values(Guarded& guarded, const py::array& tickets, const py::array& values,
                 const Optional& outcomes, const Optional& channels, const Optional& costs) {
  tercet::Results results;
  results.tickets = row<tercet::Ticket>(tickets, "tell_values", "tickets");
  add_values(results, guarded, "tell_values", values, outcomes, channels);
  results.costs = costs_of(costs, results.tickets.size(), "tell_values");
  guarded.in_turn([&](Forest& forest) { forest.tell_values(results); });
}

void tell_verdicts(Guarded& guarded, const py::array& tickets, const py::array& steps,
                   const py::array& verdicts) {
  const tercet::Verdicts told{row<tercet::Ticket>(tickets, "tell_verdicts", "tickets"),
                              row<std::uint32_t>(steps, "tell_verdicts", "steps"),
                              row<double>(verdicts, "tell_verdicts", "verdicts")};
  guarded.in_turn([&](Forest& forest) { forest.tell_verdicts(told); });
}

void tell_outcome(Guarded& guarded, const py::array& tickets, const py::array& num_steps,
                  const py::array& outcomes, const Optional& start_verdicts,
                  const Optional& costs) {
  tercet::Outcomes told;
  told.tickets = row<tercet::Ticket>(tickets, "tell_outcome", "tickets");
  told.num_steps = row<std::uint32_t>(num_steps, "tell_outcome", "num_steps");
  told.outcomes = row<double>(outcomes, "tell_outcome", "outcomes");
  const std::size_t n = told.tickets.size();
  told.start_verdicts = row_or_none<double>(start_verdicts, n, "tell_outcome", "start_verdicts");
  told.costs = costs_of(costs, n, "tell_outcome");
  guarded.in_turn([&](Forest& forest) { forest.tell_outcome(told); });
}

void fail(Guarded& guarded, const py::array& tickets, const Optional& costs) {
  const auto failed = row<tercet::Ticket>(tickets, "fail", "tickets");
  const auto spent = costs_of(costs, failed.size(), "fail");
  guarded.in_turn([&](Forest& forest) { forest.fail(failed, spent); });
}

void cancel(Guarded& guarded, const py::array& tickets, const Optional& costs) {
  const auto withdrawn = row<tercet::Ticket>(tickets, "cancel", "tickets");
  const auto spent = costs_of(costs, withdrawn.size(), "cancel");
  guarded.in_turn([&](Forest& forest) { forest.cancel(withdrawn, spent); });
}

void save(Guarded& guarded, const std::filesystem::path& path) {
  guarded.in_turn([&](const Forest& forest) { Snapshot::save(forest, path); });
}

std::unique_ptr<Guarded> load(const std::filesystem::path& path) {
  const py::gil_scoped_release released;
  return std::make_unique<Guarded>(Snapshot::load(path));
}

py::bytes bytes_of(Guarded& guarded) {
  const tercet::Bytes bytes = guarded.in_turn(&Snapshot::of);
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

std::unique_ptr<Guarded> from_bytes(const py::bytes& given) {
  const std::string_view bytes = given;
  const py::gil_scoped_release released;
  return std::make_unique<Guarded>(
      Snapshot::restore({reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size()}));
}

// ValueErrors with the ticket and its tree as attributes; one class per fault, in its order.
void bind_errors(py::module_& m) {
  static PyObject* types[4];
  const auto define = [&m](const char* name, PyObject* base) {
    PyObject* type = PyErr_NewException(("tercet." + std::string(name)).c_str(), base, nullptr);
    if (type == nullptr) throw py::error_already_set();
    m.add_object(name, py::reinterpret_borrow<py::object>(type));
    return type;
  };
  PyObject* base = define("TicketError", PyExc_ValueError);
  types[0] = define("UnknownTicketError", base);
  types[1] = define("RepeatedTicketError", base);
  types[2] = define("LateTicketError", base);
  types[3] = define("TicketKindError", base);
  static PyObject* snapshot_error = define("SnapshotError", PyExc_ValueError);
  py::register_local_exception_translator([](std::exception_ptr caught) {
    try {
      if (caught) std::rethrow_exception(caught);
    } catch (const BadTicket& e) {
      const py::handle type(types[static_cast<int>(e.fault)]);
      const py::object error = type(e.what());
      error.attr("ticket") = e.ticket;
      error.attr("tree") = tercet::tree_of(e.ticket);
      PyErr_SetObject(type.ptr(), error.ptr());
    } catch (const tercet::SnapshotError& e) {
      PyErr_SetString(snapshot_error, e.what());
    } catch (const std::filesystem::filesystem_error& e) {
      const std::string& file = e.path1().native();
      const auto name = py::reinterpret_steal<py::object>(
          PyUnicode_DecodeFSDefaultAndSize(file.data(), static_cast<Py_ssize_t>(file.size())));
      const py::object error =
          py::handle(PyExc_OSError)(e.code().value(), e.code().message(), name);
      PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
    }
  });
}

// One of several names.
template <typename T>
struct Name {
  const char* name;
  T value;
};

template <typename T, std::size_t n>
T named(const Name<T> (&names)[n], const std::string& given, const char* setting) {
  std::string all;
  for (const Name<T>& one : names) {
    if (given == one.name) return one.value;
    all += (all.empty() ? "\"" : ", \"") + std::string(one.name) + "\"";
  }
  throw py::value_error("Forest: " + std::string(setting) + " must be one of " + all + ", got \"" +
                        given + "\"");
}

constexpr Name<tercet::Rule> kRules[] = {{"uct", tercet::Rule::kUct},
                                         {"uct_released", tercet::Rule::kReleased},
                                         {"puct", tercet::Rule::kPuct},
                                         {"gumbel", tercet::Rule::kGumbel}};
constexpr Name<tercet::FirstPlay> kFirstPlays[] = {{"first", tercet::FirstPlay::kFirst},
                                                   {"value", tercet::FirstPlay::kValue},
                                                   {"parent", tercet::FirstPlay::kParent},
                                                   {"prior", tercet::FirstPlay::kPrior}};
constexpr Name<tercet::MinMax> kScopes[] = {{"none", tercet::MinMax::kNone},
                                            {"siblings", tercet::MinMax::kSiblings},
                                            {"tree", tercet::MinMax::kTree}};
constexpr Name<tercet::Unfinished> kUnfinished[] = {
    {"unobserved", tercet::Unfinished::kUnobserved},
    {"virtual_loss", tercet::Unfinished::kVirtualLoss}};
constexpr Name<tercet::Backup> kBackups[] = {
    {"mean", tercet::Backup::kMean},        {"sum", tercet::Backup::kSum},
    {"max", tercet::Backup::kMax},          {"min", tercet::Backup::kMin},
    {"product", tercet::Backup::kProduct},  {"last", tercet::Backup::kLast},
    {"children", tercet::Backup::kChildren}};
constexpr Name<tercet::Aggregation> kAggregations[] = {
    {"mean", tercet::Aggregation::kMean},       {"sum", tercet::Aggregation::kSum},
    {"max", tercet::Aggregation::kMax},         {"min", tercet::Aggregation::kMin},
    {"product", tercet::Aggregation::kProduct}, {"last", tercet::Aggregation::kLast}};
constexpr Name<tercet::Source> kSources[] = {{"value", tercet::Source::kValue},
                                             {"step", tercet::Source::kStep},
                                             {"outcome", tercet::Source::kOutcome},
                                             {"start", tercet::Source::kStart},
                                             {"total", tercet::Source::kTotal}};
constexpr Name<tercet::TicketMode> kModes[] = {{"together", tercet::TicketMode::kTogether},
                                               {"apart", tercet::TicketMode::kApart},
                                               {"lazy", tercet::TicketMode::kLazy}};

// Settings taken from keyword arguments.
class Given {
 public:
  explicit Given(const py::dict& arguments) : arguments_(arguments) {}

  template <typename T>
  void operator()(const char* name, T& setting) {
    if (const py::object value = take(name)) setting = converted<T>(name, value);
  }
  template <typename T, std::size_t n>
  void operator()(const char* name, T& setting, const Name<T> (&names)[n]) {
    if (const py::object value = take(name)) {
      setting = named(names, converted<std::string>(name, value), name);
    }
  }
  void limit(const char* name, double& setting) {
    const py::object value = take(name);
    if (value && !value.is_none()) setting = converted<double>(name, value);
  }
  void channels(std::vector<tercet::ChannelConfig>& channels) {
    const py::object value = take("channels");
    if (!value) return;
    for (const py::handle each : converted<py::sequence>("channels", value)) {
      const auto parts = converted<std::tuple<std::string, std::string, double>>("channels", each);
      const auto& [source, how, gamma] = parts;
      channels.push_back(
          {named(kSources, source, "channels"), {named(kAggregations, how, "channels"), gamma}});
    }
  }

  // Throws TypeError for an argument that is no setting.
  void finish() const {
    for (const auto& [name, value] : arguments_) {
      if (!taken_.contains(name)) {
        throw py::type_error("Forest: there is no setting " + std::string(py::repr(name)) +
                             "; help(tercet.Forest) lists them");
      }
    }
  }

 private:
  py::object take(const char* name) {
    if (!arguments_.contains(name)) return {};
    taken_.add(name);
    return arguments_[name];
  }

  template <typename T>
  static T converted(const char* name, const py::handle& value) {
    try {
      if (!value.is_none()) return value.cast<T>();
    } catch (const py::cast_error&) {  // as below
    }
    throw py::type_error(std::string("Forest: ") + name + " cannot be " +
                         std::string(py::repr(value)));
  }

  py::dict arguments_;
  py::set taken_;
};

// Settings as keyword arguments.
class Shown {
 public:
  template <typename T>
  void operator()(const char* name, const T& setting) {
    arguments[name] = py::cast(setting);
  }
  template <typename T, std::size_t n>
  void operator()(const char* name, const T& setting, const Name<T> (&names)[n]) {
    arguments[name] = name_of(names, setting);
  }
  void limit(const char* name, double setting) {
    arguments[name] =
        setting == tercet::Budget::kNone ? py::object(py::none()) : py::float_(setting);
  }
  void channels(const std::vector<tercet::ChannelConfig>& channels) {
    py::list all;
    for (const tercet::ChannelConfig& one : channels) {
      all.append(py::make_tuple(name_of(kSources, one.source),
                                name_of(kAggregations, one.channel.how), one.channel.gamma));
    }
    arguments["channels"] = all;
  }

  py::dict arguments;

 private:
  template <typename T, std::size_t n>
  static std::string name_of(const Name<T> (&names)[n], T value) {
    for (const Name<T>& one : names) {
      if (one.value == value) return one.name;
    }
    throw std::logic_error("Forest: a choice without a name");
  }
};

template <typename Io, typename B>
void limits(Io& io, B& budget) {
  io.limit("evaluations", budget.evaluations);
  io.limit("nodes", budget.nodes);
  io.limit("model_calls", budget.model_calls);
  io.limit("tokens", budget.tokens);
  io.limit("tool_calls", budget.tool_calls);
  io.limit("seconds", budget.seconds);
}

// Each setting by its name, in both directions.
template <typename Io, typename C>
void settings(Io& io, C& c) {
  io("rule", c.select.rule, kRules);
  io("c_uct", c.select.c_uct);
  io("c_base", c.select.c_base);
  io("c_init", c.select.c_init);
  io("first_play", c.select.first_play, kFirstPlays);
  io("first_play_value", c.select.first_play_value);
  io("min_max", c.select.min_max, kScopes);
  io("unfinished", c.select.unfinished, kUnfinished);
  io("virtual_loss", c.select.virtual_loss);
  io("gumbel_considered", c.select.gumbel_considered);
  io("gumbel_value_scale", c.select.gumbel_value_scale);
  io("gumbel_maxvisit_init", c.select.gumbel_maxvisit_init);
  io("dirichlet_alpha", c.select.dirichlet_alpha);
  io("dirichlet_fraction", c.select.dirichlet_fraction);
  io("dual_target", c.dual_target);
  io("widening", c.widening);
  io("widening_alpha", c.widening_alpha);
  io("max_children", c.max_children);
  io("solver", c.solver);
  io("merge_duplicates", c.merge_duplicates);
  io("backup", c.backup.how, kBackups);
  io("gamma", c.backup.gamma);
  io.channels(c.backup.channels);
  io("reward", c.reward);
  io("stop_positives", c.stop.positives);
  io("stop_negatives", c.stop.negatives);
  io("stop_correct", c.stop.correct);
  io("stop_converged", c.stop.converged);
  io("record", c.record);
  io("tickets", c.tickets, kModes);
  io("max_in_flight", c.max_in_flight);
  io("visits_per_flight", c.visits_per_flight);
  io("max_unverified", c.max_unverified);
  io("max_attempts", c.max_attempts);
  io("failed_value", c.failed_value);
  io("max_bytes", c.max_bytes);
  limits(io, c.budget);
}

std::unique_ptr<Guarded> make_forest(const py::kwargs& arguments) {
  ForestConfig config;
  Given given(arguments);
  settings(given, config);
  given.finish();
  return std::make_unique<Guarded>(Forest(config));
}

py::dict settings_of(Guarded& guarded) {
  const ForestConfig config = guarded.in_turn([](const Forest& forest) { return forest.config(); });
  Shown shown;
  settings(shown, config);
  return shown.arguments;
}

tercet::TreeId add_tree(Guarded& guarded, std::int64_t root_handle, std::uint32_t simulations,
                        std::uint64_t seed, const py::kwargs& arguments) {
  tercet::Budget budget;
  Given given(arguments);
  limits(given, budget);
  given.finish();
  return guarded.in_turn(
      [&](Forest& forest) { return forest.add_tree(root_handle, simulations, seed, budget); });
}

tercet::TreeId add_tree_along(Guarded& guarded, std::int64_t root_handle, std::uint32_t simulations,
                              const py::array& landings, std::uint64_t seed) {
  const auto script = row<std::uint32_t>(landings, "add_tree_along", "landings");
  return guarded.in_turn([&](Forest& forest) {
    return forest.add_tree_along(root_handle, simulations, script, seed);
  });
}

py::array_t<std::uint32_t> landings_of(Guarded& guarded, tercet::TreeId tree) {
  const auto landings = guarded.in_turn([&](Forest& forest) { return forest.landings(tree); });
  return py::array_t<std::uint32_t>(static_cast<py::ssize_t>(landings.size()), landings.data());
}

py::array channels_of(const py::object& self) {
  const auto& columns = self.cast<const TreeColumns&>();
  const auto n = static_cast<py::ssize_t>(columns.node.size());
  const auto channels = static_cast<py::ssize_t>(columns.channels.size()) / n;
  py::array_t<double> view({n, channels}, columns.channels.data(), self);
  view.attr("flags").attr("writeable") = false;
  return view;
}

// A repr from the attributes that are numbers, and from lengths.
py::str shown(const py::object& self, std::initializer_list<const char*> names) {
  std::string text(py::str(py::type::of(self).attr("__name__")));
  text += "(";
  const char* separator = "";
  for (const char* name : names) {
    text += separator + std::string(name) + "=" + std::string(py::repr(self.attr(name)));
    separator = ", ";
  }
  return text + ")";
}

void bind_columns(py::module_& m) {
  py::class_<Leaves>(m, "Leaves", "A batch of leaves to look at, as columns.")
      .def_property_readonly("ticket", column(&Leaves::ticket))
      .def_property_readonly("tree", column(&Leaves::tree))
      .def_property_readonly("node", column(&Leaves::node))
      .def_property_readonly("kind", column(&Leaves::kind))
      .def_property_readonly("depth", column(&Leaves::depth))
      .def_property_readonly("handle", column(&Leaves::handle))
      .def_property_readonly("attempt", column(&Leaves::attempt))
      .def("__len__", &Leaves::size)
      .def("__repr__", [](const Leaves& leaves) {
        return "<Leaves: " + std::to_string(leaves.size()) +
               " of ticket, tree, node, kind, depth, "
               "handle, attempt>";
      });
  py::class_<TreeColumns>(m, "TreeColumns", "All nodes of a tree, as columns.")
      .def_property_readonly("node", column(&TreeColumns::node))
      .def_property_readonly("parent", column(&TreeColumns::parent))
      .def_property_readonly("depth", column(&TreeColumns::depth))
      .def_property_readonly("visits", column(&TreeColumns::visits))
      .def_property_readonly("in_flight", column(&TreeColumns::in_flight))
      .def_property_readonly("total", column(&TreeColumns::total))
      .def_property_readonly("value", column(&TreeColumns::value))
      .def_property_readonly("handle", column(&TreeColumns::handle))
      .def_property_readonly("terminal", column(&TreeColumns::terminal))
      .def_property_readonly("closed", column(&TreeColumns::closed))
      .def_property_readonly("prior", column(&TreeColumns::prior))
      .def_property_readonly("verdict", column(&TreeColumns::verdict))
      .def_property_readonly("channels", &channels_of)
      .def("__len__", [](const TreeColumns& c) { return c.node.size(); })
      .def("__repr__", [](const TreeColumns& c) {
        return "<TreeColumns: " + std::to_string(c.node.size()) + " nodes>";
      });
  py::class_<tercet::Cost>(m, "Cost", "What evaluations cost, as told.")
      .def_readonly("model_calls", &tercet::Cost::model_calls)
      .def_readonly("tokens", &tercet::Cost::tokens)
      .def_readonly("tool_calls", &tercet::Cost::tool_calls)
      .def_readonly("seconds", &tercet::Cost::seconds)
      .def("__repr__", [](const py::object& self) {
        return shown(self, {"model_calls", "tokens", "tool_calls", "seconds"});
      });
  py::class_<TreeStatus>(m, "TreeStatus", "How far a tree has come.")
      .def_readonly("simulations", &TreeStatus::simulations)
      .def_readonly("committed", &TreeStatus::committed)
      .def_readonly("in_flight", &TreeStatus::in_flight)
      .def_readonly("positives", &TreeStatus::positives)
      .def_readonly("negatives", &TreeStatus::negatives)
      .def_readonly("evaluations", &TreeStatus::evaluations)
      .def_readonly("nodes", &TreeStatus::nodes)
      .def_readonly("spent", &TreeStatus::spent)
      .def_property_readonly("stop_reason",
                             [](const TreeStatus& s) { return tercet::name_of(s.reason); })
      .def("__repr__", [](const py::object& self) {
        return shown(self, {"simulations", "committed", "in_flight", "positives", "negatives",
                            "evaluations", "nodes", "spent", "stop_reason"});
      });
  py::class_<Counters>(m, "Counters", "What a forest has done so far.")
      .def_readonly("trees", &Counters::trees)
      .def_readonly("finished", &Counters::finished)
      .def_readonly("simulations", &Counters::simulations)
      .def_readonly("evaluations", &Counters::evaluations)
      .def_readonly("expansions", &Counters::expansions)
      .def_readonly("in_flight", &Counters::in_flight)
      .def_readonly("waiting", &Counters::waiting)
      .def_readonly("failures", &Counters::failures)
      .def_readonly("given_up", &Counters::given_up)
      .def_readonly("cancelled", &Counters::cancelled)
      .def_readonly("merged", &Counters::merged)
      .def_readonly("positives", &Counters::positives)
      .def_readonly("negatives", &Counters::negatives)
      .def_readonly("nodes", &Counters::nodes)
      .def_readonly("bytes", &Counters::bytes)
      .def_readonly("spent", &Counters::spent)
      .def("__repr__", [](const py::object& self) {
        return shown(self, {"trees", "finished", "simulations", "evaluations", "expansions",
                            "in_flight", "waiting", "failures", "given_up", "cancelled", "merged",
                            "positives", "negatives", "nodes", "bytes", "spent"});
      });
}

}  // namespace

void bind_forest(py::module_& m) {
  bind_errors(m);
  bind_columns(m);
  py::native_enum<tercet::Kind>(m, "TicketKind", "enum.IntEnum")
      .value("evaluate", tercet::Kind::kEvaluate)
      .value("expand", tercet::Kind::kExpand)
      .value("verify", tercet::Kind::kVerify)
      .finalize();
  py::class_<Guarded>(m, "Forest", "Many searches at once, behind ask and tell.")
      .def(py::init(&make_forest))
      .def_property_readonly("settings", &settings_of, "The keyword arguments that make this one.")
      .def("add_tree", &add_tree, "root_handle"_a, "simulations"_a, py::kw_only(), "seed"_a = 0,
           "A tree whose root has this handle, to be visited this many times.")
      .def("add_tree_along", &add_tree_along, "root_handle"_a, "simulations"_a, "landings"_a,
           py::kw_only(), "seed"_a = 0, "A tree whose descents land where those of another did.")
      .def("remove_tree", in_turn(&Forest::remove_tree), "tree"_a, "Frees the nodes of a tree.")
      .def("extend", in_turn(&Forest::extend), "tree"_a, "simulations"_a,
           "Allows a tree more simulations.")
      .def("reroot", in_turn(&Forest::reroot), "tree"_a, "node"_a, "simulations"_a,
           "Goes on from a node as the root.")
      .def("reallocate", in_turn(&Forest::reallocate),
           "Gives what stopped trees left unused to the others; how many simulations.")
      .def("ask", in_turn(&Forest::ask), "max_leaves"_a,
           "At most max_leaves leaves; none when all wait for tell, or are done.")
      .def("tell", &tell, "tickets"_a, "values"_a, "num_children"_a, "handles"_a, py::kw_only(),
           "priors"_a = py::none(), "terminal"_a = py::none(), "outcomes"_a = py::none(),
           "channels"_a = py::none(), "costs"_a = py::none(),
           "What was found out about leaves; none of it where one is wrong.")
      .def("tell_children", &tell_children, "tickets"_a, "num_children"_a, "handles"_a,
           py::kw_only(), "priors"_a = py::none(), "terminal"_a = py::none(),
           "costs"_a = py::none(), "The children of leaves that were to be expanded.")
      .def("tell_values", &tell_values, "tickets"_a, "values"_a, py::kw_only(),
           "outcomes"_a = py::none(), "channels"_a = py::none(), "costs"_a = py::none(),
           "The values of leaves that were to be verified.")
      .def("tell_verdicts", &tell_verdicts, "tickets"_a, "steps"_a, "verdicts"_a,
           "Verdicts of steps of rollouts, in any portions.")
      .def("tell_outcome", &tell_outcome, "tickets"_a, "num_steps"_a, "outcomes"_a, py::kw_only(),
           "start_verdicts"_a = py::none(), "costs"_a = py::none(), "How rollouts ended.")
      .def("fail", &fail, "tickets"_a, py::kw_only(), "costs"_a = py::none(),
           "The evaluation of these failed.")
      .def("cancel", &cancel, "tickets"_a, py::kw_only(), "costs"_a = py::none(),
           "As if these had not been handed out.")
      .def("recall", in_turn(&Forest::recall),
           "Has all tickets that are out handed out again; how many there are.")
      .def("is_finished", in_turn(&Forest::is_finished), "tree"_a)
      .def("status", in_turn(&Forest::status), "tree"_a, "How far a tree has come.")
      .def("columns", in_turn(&Forest::columns), "tree"_a, "All nodes of a tree.")
      .def("landings", &landings_of, "tree"_a, "Where descents landed, if that is recorded.")
      .def("choice", in_turn(&Forest::choice), "tree"_a, "The child of the root to take.")
      .def("counters", &Guarded::counters, "What was done up to the last call.")
      .def("to_bytes", &bytes_of, "The whole state, tickets that are out included.")
      .def_static("from_bytes", &from_bytes, "data"_a, "A forest as `to_bytes` gave it.")
      .def("save", &save, "path"_a,
           "Writes the whole state; `path` is the old file or the whole new one.")
      .def_static("load", &load, "path"_a, "A forest as `save` wrote it.");
}
