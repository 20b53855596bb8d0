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
}

// "from thinwire import _C" loads the library, which registers the operators; there is nothing else to import.
PyMODINIT_FUNC PyInit__C(void) {
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
    return PyModule_Create(&module);
}
