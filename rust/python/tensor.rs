//! Handing tensors over without a copy: the buffer protocol and DLPack.

use std::ffi::{CStr, c_int, c_void};
use std::sync::Arc;

use pyo3::exceptions::{PyBufferError, PyTypeError};
use pyo3::ffi;
use pyo3::prelude::*;

use crate::dtype::Dtype;

/// Where the bytes are.
pub(super) enum Storage {
    /// In a private mapping of a shard.
    Mapped(Arc<memmap2::MmapMut>),
    /// In memory, computed.
    Single(Vec<f32>),
    /// The same in f64.
    Double(Vec<f64>),
}

/// Bytes of a shard (or computed values) with a dtype and a shape.
///
/// `torch.from_dlpack(t)` and `numpy.from_dlpack(t)` share its memory; `memoryview(t)` and
/// `numpy.asarray(t)` see it read-only. bf16 stays bf16 in DLPack; in the buffer protocol, which
/// has no name for it, its elements are their 16-bit patterns (format "H"). Writing through DLPack
/// changes this process's private pages, never the file.
#[pyclass(frozen, module = "reasonvec._reasonvec")]
pub(super) struct Tensor(Arc<Inner>);

struct Inner {
    storage: Storage,
    offset: usize,
    dtype: Dtype,
    shape: Vec<i64>,
    strides: Vec<i64>,
}

impl Inner {
    fn data(&self) -> *mut c_void {
        match &self.storage {
            Storage::Mapped(map) => map[self.offset..].as_ptr().cast_mut().cast(),
            Storage::Single(values) => values.as_ptr().cast_mut().cast(),
            Storage::Double(values) => values.as_ptr().cast_mut().cast(),
        }
    }

    fn elements(&self) -> i64 {
        self.shape.iter().product()
    }
}

impl Tensor {
    pub(super) fn new(storage: Storage, offset: usize, dtype: Dtype, shape: Vec<u64>) -> Self {
        let shape: Vec<i64> = shape.into_iter().map(|d| d as i64).collect();
        let mut strides = vec![1i64; shape.len()];
        for i in (1..shape.len()).rev() {
            strides[i - 1] = strides[i] * shape[i].max(1);
        }
        Self(Arc::new(Inner { storage, offset, dtype, shape, strides }))
    }
}

/// `DLDataType` codes of DLPack.
fn dlpack_type(dtype: Dtype) -> Option<u8> {
    Some(match dtype {
        Dtype::I8 | Dtype::I16 | Dtype::I32 | Dtype::I64 => 0,
        Dtype::U8 | Dtype::U16 | Dtype::U32 | Dtype::U64 => 1,
        Dtype::F16 | Dtype::F32 | Dtype::F64 => 2,
        Dtype::BF16 => 4,
        Dtype::C64 => 5,
        Dtype::Bool => 6,
        Dtype::F8E4M3 | Dtype::F8E5M2 | Dtype::F8E8M0 => return None,
    })
}

/// struct-module formats.
fn buffer_format(dtype: Dtype) -> &'static CStr {
    match dtype {
        Dtype::F64 => c"d",
        Dtype::F32 => c"f",
        Dtype::F16 => c"e",
        Dtype::BF16 | Dtype::U16 => c"H",
        Dtype::I64 => c"q",
        Dtype::I32 => c"i",
        Dtype::I16 => c"h",
        Dtype::I8 => c"b",
        Dtype::U64 => c"Q",
        Dtype::U32 => c"I",
        Dtype::Bool => c"?",
        Dtype::C64 => c"Zf",
        Dtype::U8 | Dtype::F8E4M3 | Dtype::F8E5M2 | Dtype::F8E8M0 => c"B",
    }
}

#[repr(C)]
struct DlDevice {
    kind: i32,
    id: i32,
}

#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device: DlDevice,
    ndim: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

#[repr(C)]
struct DlManagedTensor {
    tensor: DlTensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut DlManagedTensor)>,
}

const CPU: i32 = 1;
const CAPSULE: &CStr = c"dltensor";

#[allow(unsafe_code)]
unsafe extern "C" fn delete_managed(managed: *mut DlManagedTensor) {
    // SAFETY: called once, by whoever owns the managed tensor, with the pointer that `__dlpack__` made of a Box whose context is an Arc made into a raw pointer.
    unsafe {
        let managed = Box::from_raw(managed);
        drop(Arc::from_raw(managed.context.cast::<Inner>()));
    }
}

#[allow(unsafe_code)]
unsafe extern "C" fn delete_capsule(capsule: *mut ffi::PyObject) {
    // SAFETY: Python calls this with the capsule that `__dlpack__` made. A consumer renames the capsule when it takes the tensor; only one that still
    // has its first name owns it.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, CAPSULE.as_ptr()) == 1 {
            delete_managed(ffi::PyCapsule_GetPointer(capsule, CAPSULE.as_ptr()).cast());
        }
    }
}

#[pymethods]
impl Tensor {
    /// The format's safetensors name: "BF16", "F32", ...
    #[getter]
    fn dtype(&self) -> &'static str {
        self.0.dtype.name()
    }

    /// The shape.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, pyo3::types::PyTuple>> {
        pyo3::types::PyTuple::new(py, &self.0.shape)
    }

    /// Bytes.
    #[getter]
    fn nbytes(&self) -> i64 {
        self.0.elements() * self.0.dtype.size() as i64
    }

    fn __repr__(&self) -> String {
        format!("Tensor({}, {:?})", self.0.dtype, self.0.shape)
    }

    fn __len__(&self) -> PyResult<usize> {
        let first =
            self.0.shape.first().ok_or_else(|| PyTypeError::new_err("a tensor without dimensions has no length"))?;
        Ok(*first as usize)
    }

    /// The DLPack device: (1, 0), the processor.
    fn __dlpack_device__(&self) -> (i32, i32) {
        (CPU, 0)
    }

    /// A DLPack capsule that shares this memory.
    #[allow(unsafe_code)]
    #[pyo3(signature = (*, stream: "object | None" = None, max_version: "object | None" = None, dl_device=None, copy=None) -> "CapsuleType")]
    fn __dlpack__(
        &self,
        py: Python<'_>,
        stream: Option<Py<PyAny>>,
        max_version: Option<Py<PyAny>>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Py<PyAny>> {
        let _ = (stream, max_version);
        if dl_device.is_some_and(|d| d != (CPU, 0)) || copy == Some(true) {
            return Err(PyBufferError::new_err(
                "a mapped tensor is handed over where it is, on the processor and without a copy",
            ));
        }
        let code = dlpack_type(self.0.dtype).ok_or_else(|| {
            PyBufferError::new_err(format!("{} has no DLPack type; take its bytes with memoryview", self.0.dtype))
        })?;
        let inner = Arc::clone(&self.0);
        let managed = Box::new(DlManagedTensor {
            tensor: DlTensor {
                data: inner.data(),
                device: DlDevice { kind: CPU, id: 0 },
                ndim: inner.shape.len() as i32,
                code,
                bits: (inner.dtype.size() * 8) as u8,
                lanes: 1,
                shape: inner.shape.as_ptr().cast_mut(),
                strides: inner.strides.as_ptr().cast_mut(),
                byte_offset: 0,
            },
            context: Arc::into_raw(inner).cast_mut().cast(),
            deleter: Some(delete_managed),
        });
        let managed = Box::into_raw(managed);
        // SAFETY: the pointer is live until its deleter runs: from the capsule's destructor, or from the consumer that took it over.
        unsafe {
            let capsule = ffi::PyCapsule_New(managed.cast(), CAPSULE.as_ptr(), Some(delete_capsule));
            if capsule.is_null() {
                delete_managed(managed);
                return Err(PyErr::fetch(py));
            }
            Ok(Bound::from_owned_ptr(py, capsule).unbind())
        }
    }

    #[allow(unsafe_code)]
    unsafe fn __getbuffer__(slf: PyRef<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        if view.is_null() {
            return Err(PyBufferError::new_err("no view to fill"));
        }
        if flags & ffi::PyBUF_WRITABLE == ffi::PyBUF_WRITABLE {
            return Err(PyBufferError::new_err(
                "tensors of a checkpoint are read-only here; copy, or use DLPack for private pages",
            ));
        }
        let inner = &slf.0;
        let size = inner.dtype.size() as isize;
        let layout: Box<[isize]> =
            inner.shape.iter().map(|&d| d as isize).chain(inner.strides.iter().map(|&s| s as isize * size)).collect();
        let ndim = inner.shape.len();
        let layout = Box::into_raw(layout).cast::<isize>();
        // SAFETY: `view` is the caller's, not null. The layout is freed by `__releasebuffer__`, which rebuilds the slice from `ndim`; the data live as long
        // as the tensor, which the view owns through `obj`.
        unsafe {
            (*view).buf = inner.data();
            (*view).len = inner.elements() as isize * size;
            (*view).itemsize = size;
            (*view).readonly = 1;
            (*view).ndim = ndim as c_int;
            (*view).format = if flags & ffi::PyBUF_FORMAT == ffi::PyBUF_FORMAT {
                buffer_format(inner.dtype).as_ptr().cast_mut()
            } else {
                std::ptr::null_mut()
            };
            (*view).shape = if flags & ffi::PyBUF_ND == ffi::PyBUF_ND { layout } else { std::ptr::null_mut() };
            (*view).strides =
                if flags & ffi::PyBUF_STRIDES == ffi::PyBUF_STRIDES { layout.add(ndim) } else { std::ptr::null_mut() };
            (*view).suboffsets = std::ptr::null_mut();
            (*view).internal = layout.cast();
            (*view).obj = slf.into_ptr();
        }
        Ok(())
    }

    #[allow(unsafe_code)]
    unsafe fn __releasebuffer__(&self, view: *mut ffi::Py_buffer) {
        // SAFETY: `internal` is the layout that `__getbuffer__` made for this view, of twice as many numbers as there are dimensions.
        unsafe {
            let layout = (*view).internal.cast::<isize>();
            drop(Box::from_raw(std::ptr::slice_from_raw_parts_mut(layout, 2 * self.0.shape.len())));
        }
    }
}
