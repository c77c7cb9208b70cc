// `import sivae_dist._C` does what loading the library does: its operators register themselves.
#if __has_include(<Python.h>)
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
#endif
