//! The single way in: detached from the interpreter, with progress, Ctrl-C and errors handled in one place.

use std::sync::mpsc;
use std::time::Duration;

use pyo3::exceptions::{PyKeyboardInterrupt, PyOSError, PyRuntimeError};
use pyo3::prelude::*;

use crate::stream::Control;
use crate::{Error, Result};

mod exceptions {
    pyo3::import_exception!(reasonvec.errors, DamageError);
    pyo3::import_exception!(reasonvec.errors, FormatError);
    pyo3::import_exception!(reasonvec.errors, MismatchError);
    pyo3::import_exception!(reasonvec.errors, NonFiniteError);
    pyo3::import_exception!(reasonvec.errors, ReasonvecError);
}

/// How often progress is told and signals are looked for.
const PULSE: Duration = Duration::from_millis(50);

/// Runs `work` on a thread of its own while this one, detached, wakes up to tell progress and to see Ctrl-C.
pub(super) fn enter<R: Send>(
    py: Python<'_>,
    progress: Option<Py<PyAny>>,
    work: impl FnOnce(&Control) -> Result<R> + Send,
) -> PyResult<R> {
    let control = Control::default();
    let (send, receive) = mpsc::channel();
    // The receiver is used by one thread at a time, but `detach` cannot know.
    let receive = std::sync::Mutex::new(receive);
    std::thread::scope(|scope| {
        let control = &control;
        let worker = scope.spawn(move || {
            // Nobody listens any more only if the caller's thread is gone.
            let _ = send.send(work(control));
        });
        let tell = |py: Python<'_>| -> PyResult<()> {
            py.check_signals()?;
            if let Some(progress) = &progress {
                progress.call1(py, control.progress())?;
            }
            Ok(())
        };
        let mut interrupted: Option<PyErr> = None;
        loop {
            let received =
                py.detach(|| receive.lock().unwrap_or_else(std::sync::PoisonError::into_inner).recv_timeout(PULSE));
            match received {
                Ok(result) => {
                    if let Some(error) = interrupted {
                        return Err(error);
                    }
                    if let (Ok(_), Some(progress)) = (&result, &progress) {
                        progress.call1(py, control.progress())?;
                    }
                    return result.map_err(|e| fail(py, e));
                }
                Err(mpsc::RecvTimeoutError::Timeout) if interrupted.is_none() => {
                    if let Err(error) = tell(py) {
                        control.cancel();
                        interrupted = Some(error);
                    }
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    // Joined here, its panic does not become that of the scope.
                    let _ = py.detach(|| worker.join());
                    return Err(PyRuntimeError::new_err(
                        "the core stopped unexpectedly; please report this with the message above",
                    ));
                }
            }
        }
    })
}

/// The Python exception of an error.
pub(super) fn fail(_py: Python<'_>, error: Error) -> PyErr {
    let message = error.to_string();
    match error {
        Error::Io { path, action, source } => {
            let errno = source.raw_os_error().unwrap_or_else(|| errno_of(source.kind()));
            let strerror = format!("cannot {action} it: {source}");
            PyOSError::new_err((errno, strerror, path.display().to_string()))
        }
        Error::Format { .. } => exceptions::FormatError::new_err(message),
        Error::Mismatch { .. } => exceptions::MismatchError::new_err(message),
        Error::NonFinite { .. } => exceptions::NonFiniteError::new_err(message),
        Error::Damage { .. } => exceptions::DamageError::new_err(message),
        Error::Usage(_) => exceptions::ReasonvecError::new_err(message),
        Error::Cancelled => PyKeyboardInterrupt::new_err(message),
    }
}

/// The errno of errors that the core made itself. The numbers are the same on every system that Python names them on.
fn errno_of(kind: std::io::ErrorKind) -> i32 {
    match kind {
        std::io::ErrorKind::NotFound => 2,
        std::io::ErrorKind::PermissionDenied => 13,
        std::io::ErrorKind::StorageFull => 28,
        _ => 5,
    }
}
