//! What a run has finished, one JSON line each, so that a killed run continues where it stopped.
//!
//! The first line is the fingerprint of the plan and its inputs. A line that was cut off by the kill is ignored. The journal says what was finished, not that the disk
//! has it: whoever resumes checks the digests of what it names.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Error, Result};

/// The journal's name in an output folder.
pub const NAME: &str = ".reasonvec-journal";

/// An open journal.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
}

impl Journal {
    /// Starts a journal, replacing any other.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(folder: &Path, fingerprint: &str) -> Result<Self> {
        let path = folder.join(NAME);
        let mut file = File::create(&path).map_err(|e| Error::io(&path, "create", e))?;
        writeln!(file, "{}", serde_json::json!({"fingerprint": fingerprint}))
            .map_err(|e| Error::io(&path, "write", e))?;
        Ok(Self { path, file })
    }

    /// Opens a journal to go on, with the lines it has.
    ///
    /// # Errors
    /// [`Error::Usage`] if it belongs to another plan or to inputs that have changed since.
    pub fn resume<T: DeserializeOwned>(folder: &Path, fingerprint: &str) -> Result<(Self, Vec<T>)> {
        let path = folder.join(NAME);
        let file = File::open(&path).map_err(|e| Error::io(&path, "open", e))?;
        let mut lines = BufReader::new(file).split(b'\n');
        let first = lines.next().transpose().map_err(|e| Error::io(&path, "read", e))?.unwrap_or_default();
        let found: serde_json::Value = serde_json::from_slice(&first).unwrap_or_default();
        if found["fingerprint"] != fingerprint {
            return Err(Error::Usage(format!(
                "{}: the unfinished run in this folder had another recipe, or its inputs have changed since; start over with --overwrite",
                folder.display()
            )));
        }
        // Behind a line that an earlier kill cut off there may be those of an earlier resumed run.
        let done = lines.map_while(|l| l.ok()).filter_map(|l| serde_json::from_slice(&l).ok()).collect();
        let file = OpenOptions::new().append(true).open(&path).map_err(|e| Error::io(&path, "open", e))?;
        let mut journal = Self { path, file };
        // Whatever line the kill cut off must not swallow the next one.
        journal.write_raw(b"\n")?;
        Ok((journal, done))
    }

    /// Whether a folder has one.
    pub fn exists(folder: &Path) -> bool {
        folder.join(NAME).is_file()
    }

    fn write_raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|e| Error::io(&self.path, "write", e))
    }

    /// Adds a line.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn add(&mut self, line: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_vec(line).map_err(|e| Error::Usage(e.to_string()))?;
        text.push(b'\n');
        self.write_raw(&text)
    }

    /// Removes the journal: the run is whole.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn finish(self) -> Result<()> {
        std::fs::remove_file(&self.path).map_err(|e| Error::io(&self.path, "remove", e))
    }
}
