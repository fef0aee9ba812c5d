//! What can go wrong, with the file, the tensor, what was expected and what was found.

use std::path::{Path, PathBuf};

/// The result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// A message without its middle if it is long: a stranger's file could make one as long as itself.
fn shortened(text: String) -> String {
    const ENDS: [usize; 2] = [600, 200];
    if text.len() <= 2 * (ENDS[0] + ENDS[1]) {
        return text;
    }
    let boundary = |mut at: usize| {
        while !text.is_char_boundary(at) {
            at -= 1;
        }
        at
    };
    format!("{} ... {}", &text[..boundary(ENDS[0])], &text[boundary(text.len() - ENDS[1])..])
}

/// Every failure of the core. The message of each variant says where, what, and what to do next.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused to read, write, map, rename, ...
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The verb that failed: "read", "write", "rename", ...
        action: &'static str,
        /// The system's own word.
        source: std::io::Error,
    },
    /// A file breaks its format. Nothing in it can be trusted.
    #[error("{}: {problem}", path.display())]
    Format {
        /// The offending file.
        path: PathBuf,
        /// What was expected, what was found, what to do.
        problem: String,
    },
    /// Inputs that do not fit together, or a plan that cannot be carried out.
    #[error("{tensor}: {problem}")]
    Mismatch {
        /// The tensor (of the output, where there is one).
        tensor: String,
        /// What was expected, what was found, what to do.
        problem: String,
    },
    /// NaN or infinity where finite numbers are needed.
    #[error("{}: tensor {tensor}: element {index} is {value}; {advice}", path.display())]
    NonFinite {
        /// The file that holds the element.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Flat index of the first such element.
        index: u64,
        /// NaN, inf or -inf; for an overflow the finite number that did not fit.
        value: String,
        /// What to do.
        advice: &'static str,
    },
    /// Bytes are not those that the digest was made of.
    #[error("{}: {problem}", path.display())]
    Damage {
        /// The file.
        path: PathBuf,
        /// Which tensor, which digests.
        problem: String,
    },
    /// A request that makes no sense whatever the files hold.
    #[error("{0}")]
    Usage(String),
    /// The caller asked to stop.
    #[error("cancelled; nothing under a final name was changed, and `--resume` continues from here")]
    Cancelled,
}

impl Error {
    /// An I/O error with its path and verb.
    pub fn io(path: impl AsRef<Path>, action: &'static str, source: std::io::Error) -> Self {
        Self::Io { path: path.as_ref().to_path_buf(), action, source }
    }

    /// A format error.
    pub fn format(path: impl AsRef<Path>, problem: impl Into<String>) -> Self {
        Self::Format { path: path.as_ref().to_path_buf(), problem: shortened(problem.into()) }
    }

    /// A mismatch.
    pub fn mismatch(tensor: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Mismatch { tensor: tensor.into(), problem: problem.into() }
    }

    /// A damage error.
    pub fn damage(path: impl AsRef<Path>, problem: impl Into<String>) -> Self {
        Self::Damage { path: path.as_ref().to_path_buf(), problem: problem.into() }
    }
}
