//! What is saved of the doorbell. It has no interrupt line to re-raise.

use std::io::Write;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use wardian_state::check::{Wrong, at_most};
use wardian_state::{Record, Refused};
use wardian_time::TimeBase;

use super::{Doorbell, MAX_VALUES};
use crate::wire::lock;

/// The doorbell as it is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DoorbellState {
    /// Words of the record that is being made.
    pub words: Vec<u32>,
    /// Rings so far.
    pub rings: u64,
    /// Records that could not be written.
    pub failed: u64,
}

impl Record for DoorbellState {
    const KIND: &'static str = "doorbell";
    const VERSION: u16 = 1;
}

impl Doorbell {
    /// What to save.
    #[must_use]
    pub fn save(&self) -> DoorbellState {
        let state = lock(&self.state);
        DoorbellState { words: state.words[..state.count].to_vec(), rings: state.rings, failed: state.failed }
    }

    /// The doorbell that was saved as `state`, to be built as [`Doorbell::new`] says. Its records begin anew with
    /// the head line; the rings count on.
    ///
    /// # Errors
    /// When a doorbell cannot be in that state.
    pub fn restore(
        time: Arc<TimeBase>,
        out: Box<dyn Write + Send>,
        state: &DoorbellState,
    ) -> Result<Doorbell, Refused> {
        at_most("words", state.words.len() as u64, 2 * MAX_VALUES as u64)
            .and_then(|()| at_most("failed", state.failed, state.rings.saturating_add(1)))
            .and_then(|()| at_most("failed", state.failed, u64::MAX >> 1))
            .map_err(Wrong::in_record::<DoorbellState>)?;
        let bell = Doorbell::new(time, out);
        {
            let mut own = lock(&bell.state);
            own.words[..state.words.len()].copy_from_slice(&state.words);
            (own.count, own.rings) = (state.words.len(), state.rings);
            own.failed = state.failed;
        }
        Ok(bell)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{RING, VALUE};
    use super::{Doorbell, DoorbellState};
    use crate::testing::twin::golden;
    use crate::testing::{Clock, SharedBuffer, at};
    use std::sync::Arc;
    use wardian_bus::Device;
    use wardian_time::Nanos;

    #[test]
    fn a_record_is_finished_after_restore() {
        let (clock, out) = (Clock::new(), SharedBuffer::default());
        clock.run(Nanos(500));
        let make =
            |state: &DoorbellState| Doorbell::restore(Arc::clone(&clock.base), Box::new(out.clone()), state);
        let state = golden(|| DoorbellState { words: vec![1, 2, 3], rings: 9, failed: 1 });
        let bell = make(&state).unwrap();
        assert_eq!(bell.save(), state);
        bell.write(at(VALUE), &4u32.to_le_bytes());
        bell.write(at(RING), &77u32.to_le_bytes());
        assert_eq!(bell.save(), DoorbellState { words: Vec::new(), rings: 10, failed: 1 });
        let text = String::from_utf8(out.take()).unwrap();
        assert!(text.ends_with(&format!(",500,77,{},{}\n", 1 + (2u64 << 32), 3 + (4u64 << 32))), "{text}");
        let refused = |state| make(&state).err().unwrap().why;
        let words = refused(DoorbellState { words: vec![0; 17], rings: 0, failed: 0 });
        assert!(words.starts_with("words:"), "{words}");
        let failed = refused(DoorbellState { words: Vec::new(), rings: 3, failed: 5 });
        assert!(failed.starts_with("failed:"), "{failed}");
    }
}
