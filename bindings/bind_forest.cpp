#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl/filesystem.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
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

namespace {

// A forest whose calls release the GIL and take turns: one beside another is refused, since both
// would break its memory.
class Guarded {
 public:
  explicit Guarded(Forest forest) : forest_(std::move(forest)) {}

  template <typename Use>
  auto in_turn(const Use& use) {
    if (busy_.exchange(true)) {
      throw std::logic_error(
          "Forest: another thread is in a call of this forest; hold a lock, or give each thread "
          "its own");
    }
    const Turn turn{busy_};
    const py::gil_scoped_release released;
    return use(forest_);
  }

 private:
  struct Turn {
    std::atomic<bool>& busy;
    ~Turn() { busy = false; }
  };

  Forest forest_;
  std::atomic<bool> busy_{false};
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

void tell(Guarded& guarded, const py::array& tickets, const py::array& values,
          const py::array& num_children, const py::array& handles) {
  const tercet::Results results{row<tercet::Ticket>(tickets, "tell", "tickets"),
                                row<double>(values, "tell", "values"),
                                row<std::uint32_t>(num_children, "tell", "num_children"),
                                row<std::int64_t>(handles, "tell", "handles")};
  guarded.in_turn([&](Forest& forest) { forest.tell(results); });
}

void fail(Guarded& guarded, const py::array& tickets) {
  const auto failed = row<tercet::Ticket>(tickets, "fail", "tickets");
  guarded.in_turn([&](Forest& forest) { forest.fail(failed); });
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
  static PyObject* types[3];
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

void bind_columns(py::module_& m) {
  py::class_<Leaves>(m, "Leaves", "A batch of leaves to look at, as columns.")
      .def_property_readonly("ticket", column(&Leaves::ticket))
      .def_property_readonly("tree", column(&Leaves::tree))
      .def_property_readonly("node", column(&Leaves::node))
      .def_property_readonly("depth", column(&Leaves::depth))
      .def_property_readonly("handle", column(&Leaves::handle))
      .def_property_readonly("attempt", column(&Leaves::attempt))
      .def("__len__", &Leaves::size);
  py::class_<TreeColumns>(m, "TreeColumns", "All nodes of a tree, as columns.")
      .def_property_readonly("node", column(&TreeColumns::node))
      .def_property_readonly("parent", column(&TreeColumns::parent))
      .def_property_readonly("depth", column(&TreeColumns::depth))
      .def_property_readonly("visits", column(&TreeColumns::visits))
      .def_property_readonly("in_flight", column(&TreeColumns::in_flight))
      .def_property_readonly("total", column(&TreeColumns::total))
      .def_property_readonly("handle", column(&TreeColumns::handle))
      .def_property_readonly("terminal", column(&TreeColumns::terminal))
      .def("__len__", [](const TreeColumns& c) { return c.node.size(); });
  py::class_<Counters>(m, "Counters", "What a forest has done so far.")
      .def_readonly("trees", &Counters::trees)
      .def_readonly("finished", &Counters::finished)
      .def_readonly("simulations", &Counters::simulations)
      .def_readonly("evaluations", &Counters::evaluations)
      .def_readonly("in_flight", &Counters::in_flight)
      .def_readonly("waiting", &Counters::waiting)
      .def_readonly("failures", &Counters::failures)
      .def_readonly("given_up", &Counters::given_up)
      .def_readonly("nodes", &Counters::nodes)
      .def_readonly("bytes", &Counters::bytes);
}

}  // namespace

void bind_forest(py::module_& m) {
  bind_errors(m);
  bind_columns(m);
  const ForestConfig defaults;
  py::class_<Guarded>(m, "Forest", "Many searches at once, behind ask and tell.")
      .def(py::init([](double c_uct, std::uint32_t max_in_flight, std::uint32_t visits_per_flight,
                       std::uint32_t max_attempts, double failed_value, std::size_t max_bytes) {
             return std::make_unique<Guarded>(Forest(
                 {c_uct, max_in_flight, visits_per_flight, max_attempts, failed_value, max_bytes}));
           }),
           py::kw_only(), "c_uct"_a = defaults.c_uct, "max_in_flight"_a = defaults.max_in_flight,
           "visits_per_flight"_a = defaults.visits_per_flight,
           "max_attempts"_a = defaults.max_attempts, "failed_value"_a = defaults.failed_value,
           "max_bytes"_a = defaults.max_bytes)
      .def("add_tree", in_turn(&Forest::add_tree), "root_handle"_a, "simulations"_a,
           "A tree whose root has this handle, to be visited this many times.")
      .def("remove_tree", in_turn(&Forest::remove_tree), "tree"_a, "Frees the nodes of a tree.")
      .def("ask", in_turn(&Forest::ask), "max_leaves"_a,
           "At most max_leaves leaves; none when all wait for tell, or are done.")
      .def("tell", &tell, "tickets"_a, "values"_a, "num_children"_a, "handles"_a,
           "What was found out about leaves; none of it where one is wrong.")
      .def("fail", &fail, "tickets"_a, "The evaluation of these failed.")
      .def("recall", in_turn(&Forest::recall),
           "Has all tickets that are out handed out again; how many there are.")
      .def("is_finished", in_turn(&Forest::is_finished), "tree"_a)
      .def("columns", in_turn(&Forest::columns), "tree"_a, "All nodes of a tree.")
      .def("counters", in_turn(&Forest::counters))
      .def("to_bytes", &bytes_of, "The whole state, tickets that are out included.")
      .def_static("from_bytes", &from_bytes, "data"_a, "A forest as `to_bytes` gave it.")
      .def("save", &save, "path"_a,
           "Writes the whole state; `path` is the old file or the whole new one.")
      .def_static("load", &load, "path"_a, "A forest as `save` wrote it.");
}
