//! The doorbell: how a guest tells the host what its clocks show, for the skew lab.
//!
//! Two 32-bit output ports. A write to [`VALUE`] adds a word to the record that is being made; a write to
//! [`RING`] gives the record its sequence number and completes it. The moment of that write, by the
//! host's raw clock and by the machine's own, is written down with it, one line of text for each:
//!
//! ```text
//! raw_ns,guest_ns,sequence,values...
//! 81230000000,2000000417,1,4000,2000000000
//! ```
//!
//! Values are 64 bits wide: two words each, the low one first; the raw clock is CLOCK_MONOTONIC_RAW. The
//! head line comes once for each life of the machine. At most [`MAX_VALUES`] values make a record, further
//! words are dropped; at most [`MAX_RECORDS`] records are kept in one life, further rings are counted.
//! Narrower writes and reads (which show zero) do nothing.

mod persist;

use std::fmt::Write as _;
use std::io::Write;
use std::sync::{Arc, Mutex};

use wardian_bus::{Access, Device};
use wardian_time::{Nanos, TimeBase, host_raw};

use crate::wire::lock;

pub use persist::DoorbellState;

/// Offset of the port that takes the words of a record.
pub const VALUE: u64 = 0;
/// Offset of the port that takes the sequence number and completes the record.
pub const RING: u64 = 4;
/// Most values of a record.
pub const MAX_VALUES: usize = 8;
/// Most records of one life of a machine: a hostile guest does not fill the host's disk.
pub const MAX_RECORDS: u64 = 1 << 20;

struct State {
    out: Box<dyn Write + Send>,
    words: [u32; 2 * MAX_VALUES],
    count: usize,
    /// Rings so far, those beyond [`MAX_RECORDS`] included.
    rings: u64,
    failed: u64,
}

/// The doorbell.
pub struct Doorbell {
    time: Arc<TimeBase>,
    raw: fn() -> Nanos,
    state: Mutex<State>,
}

impl Doorbell {
    /// A doorbell of a machine with the clock `time`, whose records go to `out`, which must not block.
    #[must_use]
    pub fn new(time: Arc<TimeBase>, out: Box<dyn Write + Send>) -> Doorbell {
        Doorbell::with_clock(time, out, host_raw)
    }

    fn with_clock(time: Arc<TimeBase>, mut out: Box<dyn Write + Send>, raw: fn() -> Nanos) -> Doorbell {
        let failed = u64::from(out.write_all(b"raw_ns,guest_ns,sequence,values...\n").is_err());
        let words = [0; 2 * MAX_VALUES];
        Doorbell { time, raw, state: Mutex::new(State { out, words, count: 0, rings: 0, failed }) }
    }

    fn ring(&self, sequence: u32) {
        // First of all: the moment is what this is about.
        let (raw, guest) = ((self.raw)(), self.time.now());
        let mut state = lock(&self.state);
        let count = std::mem::take(&mut state.count);
        state.rings = state.rings.saturating_add(1);
        if state.rings > MAX_RECORDS {
            if state.rings == MAX_RECORDS + 1 {
                tracing::warn!("The guest rang the doorbell {MAX_RECORDS} times; what follows is not kept");
            }
            return;
        }
        let mut line = format!("{},{},{sequence}", raw.0, guest.0);
        for pair in state.words[..count].chunks(2) {
            let value = pair.iter().rev().fold(0, |value, word| value << 32 | u64::from(*word));
            // Writing to a string does not fail.
            let _ = write!(line, ",{value}");
        }
        line.push('\n');
        if state.out.write_all(line.as_bytes()).is_err() {
            state.failed += 1;
        }
    }
}

impl Device for Doorbell {
    fn name(&self) -> &str {
        "doorbell"
    }

    fn read(&self, _at: Access, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, at: Access, data: &[u8]) {
        let Ok(word) = data.try_into().map(u32::from_le_bytes) else { return };
        match at.offset {
            VALUE => {
                let state = &mut *lock(&self.state);
                if let Some(slot) = state.words.get_mut(state.count) {
                    *slot = word;
                    state.count += 1;
                }
            }
            RING => self.ring(word),
            _ => {}
        }
    }

    fn inspect(&self) -> Vec<(String, String)> {
        let state = lock(&self.state);
        vec![("rings".into(), state.rings.to_string()), ("failed".into(), state.failed.to_string())]
    }
}

#[cfg(test)]
mod tests {
    use super::{Doorbell, MAX_RECORDS, MAX_VALUES, RING, VALUE};
    use crate::testing::{Clock, SharedBuffer, at};
    use std::sync::Arc;
    use wardian_bus::Device;
    use wardian_time::Nanos;

    const HEAD: &str = "raw_ns,guest_ns,sequence,values...\n";

    fn bell() -> (Doorbell, Clock, SharedBuffer) {
        let (clock, out) = (Clock::new(), SharedBuffer::default());
        let raw = || Nanos(77);
        let bell = Doorbell::with_clock(Arc::clone(&clock.base), Box::new(out.clone()), raw);
        (bell, clock, out)
    }

    fn text(out: &SharedBuffer) -> String {
        String::from_utf8(out.take()).unwrap()
    }

    fn put(bell: &Doorbell, offset: u64, word: u32) {
        bell.write(at(offset), &word.to_le_bytes());
    }

    #[test]
    fn a_record_has_both_moments_and_its_values() {
        let (bell, clock, out) = bell();
        clock.run(Nanos(5_000));
        for word in [7, 1, 0xffff_ffff, 0] {
            put(&bell, VALUE, word);
        }
        put(&bell, RING, 9);
        put(&bell, RING, 10);
        assert_eq!(text(&out), format!("{HEAD}77,5000,9,{},4294967295\n77,5000,10\n", 7 + (1u64 << 32)));
    }

    #[test]
    fn the_raw_clock_runs() {
        let (clock, out) = (Clock::new(), SharedBuffer::default());
        let bell = Doorbell::new(Arc::clone(&clock.base), Box::new(out.clone()));
        put(&bell, RING, 1);
        put(&bell, RING, 2);
        let text = text(&out);
        let raw: Vec<u64> =
            text.lines().skip(1).map(|line| line.split(',').next().unwrap().parse().unwrap()).collect();
        assert!(raw.len() == 2 && 0 < raw[0] && raw[0] <= raw[1], "{text}");
    }

    #[test]
    fn odd_accesses_do_nothing() {
        let (bell, _clock, out) = bell();
        put(&bell, VALUE, 5);
        bell.write(at(VALUE), &[1]);
        bell.write(at(VALUE), &[1, 2]);
        bell.write(at(RING), &[1]);
        bell.write(at(VALUE + 1), &[1, 2, 3, 4]);
        bell.write(at(VALUE), &[]);
        let mut data = [1; 4];
        bell.read(at(RING), &mut data);
        assert_eq!(data, [0; 4]);
        put(&bell, RING, 3);
        assert_eq!(text(&out), format!("{HEAD}77,0,3,5\n"));
    }

    #[test]
    fn a_hostile_guest_grows_nothing() {
        let (bell, _clock, out) = bell();
        for word in 0..1000 {
            put(&bell, VALUE, word);
        }
        put(&bell, RING, 0);
        let first = text(&out);
        assert_eq!(first.lines().nth(1).unwrap().split(',').count(), 3 + MAX_VALUES);
        for sequence in 0..MAX_RECORDS as u32 + 10 {
            put(&bell, RING, sequence);
        }
        // One was made above.
        assert_eq!(text(&out).lines().count() as u64, MAX_RECORDS - 1);
        assert_eq!(bell.inspect()[0].1, (MAX_RECORDS + 11).to_string());
    }
}
