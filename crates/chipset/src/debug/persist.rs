//! What is saved of the debug ports: little. Nothing is re-raised; the debug-exit port remembers nothing.

use std::io::Write;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use wardian_state::check::{Wrong, at_most};
use wardian_state::{Record, Refused};

use super::{DebugConsole, PostPort};

/// The debug console as it is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DebugConsoleState {
    /// Bytes written so far.
    pub written: u64,
    /// Bytes that could not be written.
    pub failed: u64,
}

impl Record for DebugConsoleState {
    const KIND: &'static str = "debug-console";
    const VERSION: u16 = 1;
}

impl DebugConsole {
    /// What to save.
    #[must_use]
    pub fn save(&self) -> DebugConsoleState {
        DebugConsoleState {
            written: self.written.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
        }
    }

    /// The console that was saved as `state`, on `out`.
    ///
    /// # Errors
    /// When a console cannot be in that state.
    pub fn restore(out: Box<dyn Write + Send>, state: &DebugConsoleState) -> Result<DebugConsole, Refused> {
        for (name, count) in [("written", state.written), ("failed", state.failed)] {
            at_most(name, count, u64::MAX >> 1).map_err(Wrong::in_record::<DebugConsoleState>)?;
        }
        let mut console = DebugConsole::new(out);
        (console.written, console.failed) = (AtomicU64::new(state.written), AtomicU64::new(state.failed));
        Ok(console)
    }
}

/// The POST code port as it is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PostState {
    /// The last code.
    pub code: u8,
}

impl Record for PostState {
    const KIND: &'static str = "post";
    const VERSION: u16 = 1;
}

impl PostPort {
    /// What to save.
    #[must_use]
    pub fn save(&self) -> PostState {
        PostState { code: self.last.load(Ordering::Relaxed) }
    }

    /// The port that was saved as `state`.
    ///
    /// # Errors
    /// None in this version.
    pub fn restore(state: &PostState) -> Result<PostPort, Refused> {
        Ok(PostPort { last: AtomicU8::new(state.code) })
    }
}

#[cfg(test)]
mod tests {
    use super::{DebugConsole, DebugConsoleState, PostPort, PostState};
    use crate::testing::twin::golden;
    use crate::testing::{SharedBuffer, at, read};
    use wardian_bus::Device;

    #[test]
    fn the_last_code_and_the_counts_go_on() {
        let post = PostPort::new();
        post.write(at(0), &[0x42]);
        let state = golden(|| PostState { code: 0x42 });
        assert_eq!(post.save(), state);
        assert_eq!(read(&PostPort::restore(&state).unwrap(), 0), [0x42]);

        let out = SharedBuffer::default();
        let state = golden(|| DebugConsoleState { written: 7, failed: 2 });
        let console = DebugConsole::restore(Box::new(out.clone()), &state).unwrap();
        assert_eq!(console.save(), state);
        console.write(at(0), b"x");
        assert_eq!((out.take(), console.save().written), (b"x".to_vec(), 8));
        let odd = DebugConsoleState { written: u64::MAX, failed: 0 };
        let error = DebugConsole::restore(Box::new(out), &odd).err().unwrap();
        assert!(error.why.starts_with("written:"), "{error}");
    }
}
