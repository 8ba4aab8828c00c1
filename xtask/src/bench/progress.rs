//! What a bench has measured so far, kept in a file: one that was broken off goes on from there.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::steps::Measured;

/// Finished runs of one bench.
pub struct Progress {
    file: PathBuf,
    kept: Kept,
}

#[derive(Default, Serialize, Deserialize)]
struct Kept {
    /// What the bench measures: programs, rows, options.
    what: String,
    runs: BTreeMap<String, Measured>,
}

impl Progress {
    /// Reads `file`, if it is of the same bench and `resume` is asked for; otherwise begins anew.
    pub fn open(file: PathBuf, what: String, resume: bool) -> Progress {
        let read = || serde_json::from_str::<Kept>(&fs::read_to_string(&file).ok()?).ok();
        let kept = resume.then(read).flatten().filter(|kept| kept.what == what);
        Progress { file, kept: kept.unwrap_or_else(|| Kept { what, runs: BTreeMap::new() }) }
    }

    /// How many runs are known.
    pub fn len(&self) -> usize {
        self.kept.runs.len()
    }

    /// The run `told` if it is known, otherwise what `run` measures; kept if it ended well.
    ///
    /// # Errors
    /// Those of `run`, and when the file cannot be written.
    pub fn run(&mut self, told: &str, run: impl FnOnce() -> Result<(Measured, bool)>) -> Result<Measured> {
        if let Some(known) = self.kept.runs.get(told) {
            return Ok(known.clone());
        }
        let (measured, well) = run()?;
        if well {
            self.kept.runs.insert(told.to_owned(), measured.clone());
            write(&self.file, &self.kept)?;
        }
        Ok(measured)
    }

    /// The bench is at its end.
    pub fn finish(self) -> Result<()> {
        if self.file.exists() {
            fs::remove_file(&self.file)?;
        }
        Ok(())
    }
}

fn write(file: &Path, kept: &Kept) -> Result<()> {
    // A reader sees the old or the new file, never half of one.
    let part = file.with_extension("part");
    fs::write(&part, serde_json::to_string(kept)?)
        .and_then(|()| fs::rename(&part, file))
        .with_context(|| format!("Cannot write {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goes_on_where_it_was_broken_off() {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("progress.json");
        let one = |sum: &str| {
            let mut measured = Measured::default();
            measured.sums.insert("gcc".into(), sum.into());
            measured
        };
        let mut first = Progress::open(file.clone(), "a".into(), false);
        first.run("QEMU, round 1", || Ok((one("1"), true))).expect("kept");
        first.run("ours, round 1", || Ok((one("2"), false))).expect("not kept");
        let mut again = Progress::open(file.clone(), "a".into(), true);
        assert_eq!(again.len(), 1);
        let known = again.run("QEMU, round 1", || panic!("known already")).expect("known");
        assert_eq!(known.sums["gcc"], "1");
        assert_eq!(again.run("ours, round 1", || Ok((one("3"), true))).expect("run").sums["gcc"], "3");
        assert_eq!(Progress::open(file.clone(), "b".into(), true).len(), 0, "of another bench");
        assert_eq!(Progress::open(file.clone(), "a".into(), false).len(), 0, "not asked for");
        again.finish().expect("removed");
        assert!(!file.exists());
    }
}
