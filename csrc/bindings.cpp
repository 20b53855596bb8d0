// The operators' schemas, each defined once; the implementations register themselves beside their code.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <torch/library.h>

TORCH_LIBRARY(thinwire, m) {
    m.def("accumulate_(Tensor(a!) residual, Tensor(b!)? velocity, Tensor grad, float momentum, Tensor table, "
          "int block_size, Tensor(c!) norms, Tensor(d!) status, "
          "Tensor? residual_before=None, Tensor? velocity_before=None) -> ()");
    m.def("examine(Tensor grad, Tensor table, Tensor(a!) status) -> ()");
    m.def("draw_blocks(Tensor table, Tensor units, int block_size, int seed, int step, int[] streams, int[] deals, "
          "Tensor(a!) chosen) -> ()");
    m.def("select_blocks(Tensor norms, Tensor table, int block_size, Tensor(a!) chosen) -> ()");
    m.def("gather_blocks(Tensor source, Tensor chosen, Tensor table, int block_size, Tensor? status, Tensor? scale, "
          "Tensor(a!) payload) -> ()");
    m.def("take_blocks_(Tensor(a!) source, Tensor chosen, Tensor table, int block_size, Tensor? status, "
          "Tensor? scale, Tensor(b!) payload) -> ()");
    m.def("scatter_blocks_(Tensor payloads, Tensor? inverses, Tensor chosen, Tensor table, int block_size, "
          "Tensor factors, bool accumulate, Tensor(a!) out) -> ()");
    m.def("settle_(Tensor(a!) residual, Tensor(b!)? velocity, Tensor grad, float momentum, Tensor payload, "
          "Tensor? inverse, Tensor chosen, Tensor table, int block_size, Tensor status, Tensor bad) -> ()");
    m.def("quantise_blocks_(Tensor(a!) source, Tensor chosen, Tensor table, int block_size, Tensor? status, "
          "Tensor? places, int bits, bool keep, Tensor(b!) rows) -> ()");
    m.def("unquantise_blocks(Tensor rows, int bits, Tensor? places, Tensor table, int block_size, "
          "Tensor(a!) payloads) -> ()");
    m.def("add_quantised(Tensor rows, int bits, int block_size, Tensor(a!) total) -> ()");
    m.def("add_rows_(Tensor values, Tensor places, int first, Tensor chosen, Tensor table, int block_size, "
          "float factor, Tensor bad, Tensor(a!) out) -> ()");
    m.def("deal_elements(Tensor payload, Tensor table, int block_size, Tensor begins, Tensor(a!) rows) -> ()");
    m.def("undeal_elements(Tensor rows, Tensor table, int block_size, Tensor begins, Tensor(a!) payload) -> ()");
    m.def("unite_blocks(Tensor named, Tensor table, int block_size, Tensor(a!) chosen, Tensor(b!) united) -> ()");
    m.def("place_slots(Tensor table, int block_size, Tensor turns, int ranks, int row_slots, "
          "Tensor(a!) places) -> ()");
}

// "from thinwire import _C" loads the library, which registers the operators; there is nothing else to import.
PyMODINIT_FUNC PyInit__C(void) {
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
    return PyModule_Create(&module);
}
