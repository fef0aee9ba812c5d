//! Files from strangers: headers, indexes and vector manifests that lie. None may panic, hang or take memory that no file holds;
//! each is refused with the name of the file, and of the tensor where there is one.

#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod headers;
mod indexes;
mod lowrank;
mod vectors;

use std::path::Path;

use reasonvec::Error;
use reasonvec::store::Checkpoint;

/// What a refusal to open a checkpoint says, file first.
fn refused(path: &Path) -> String {
    match Checkpoint::open(path).unwrap_err() {
        Error::Format { path, problem } => format!("{}: {problem}", path.display()),
        other => panic!("{other:?}"),
    }
}

/// Runs something on a thread of its own, so that a test fails where it would hang.
fn within_seconds<A: Send + 'static, R: Send + 'static>(a: A, f: impl FnOnce(A) -> R + Send + 'static) -> R {
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::spawn(move || send.send(f(a)));
    receive.recv_timeout(std::time::Duration::from_secs(20)).unwrap()
}
