//! What is saved of one counter.

use serde::{Deserialize, Serialize};
use wardian_state::check::{Wrong, at_most, ensure};

use super::{Bytes, Channel, Run};

/// Whether a saved counter counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CountingState {
    /// No count was written since the control word, or the gate has not triggered it.
    Idle,
    /// Since this tick.
    Since(u64),
    /// Held by the gate after this many ticks.
    Held(u64),
}

/// Which bytes of a count the processor transfers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TransferState {
    /// The low one.
    Low,
    /// The high one.
    High,
    /// Both, the low one first.
    Both,
}

/// A count that waits to come into force.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NextCountState {
    /// At this tick; at the next trigger if none.
    pub at_tick: Option<u64>,
    /// The count, 1-65536.
    pub count: u32,
}

/// A latched count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LatchState {
    /// As the processor reads it.
    pub count: u16,
    /// How many bytes are still to be read.
    pub bytes_left: u8,
}

/// One counter as it is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelState {
    /// Mode, 0-5.
    pub mode: u8,
    /// Bytes of a count.
    pub transfer: TransferState,
    /// Counts are binary-coded decimals.
    pub bcd: bool,
    /// Whether it counts.
    pub counting: CountingState,
    /// The count in force, 1-65536.
    pub reload: u32,
    /// A count that waits.
    pub next: Option<NextCountState>,
    /// A count was written since the control word.
    pub written: bool,
    /// Low byte of a count whose high byte is still to be written.
    pub low_byte: Option<u8>,
    /// The next read gives the high byte.
    pub reads_high: bool,
    /// Latched count.
    pub latch: Option<LatchState>,
    /// Latched status.
    pub latched_status: Option<u8>,
}

/// The largest count.
const MOST: u32 = 0x1_0000;

fn count(field: &str, count: u32) -> Result<u32, Wrong> {
    ensure((1..=MOST).contains(&count), field, || format!("{count} is no count"))?;
    Ok(count)
}

impl Channel {
    pub(in super::super) fn save(&self) -> ChannelState {
        ChannelState {
            mode: self.mode,
            transfer: match self.bytes {
                Bytes::Low => TransferState::Low,
                Bytes::High => TransferState::High,
                Bytes::Both => TransferState::Both,
            },
            bcd: self.bcd,
            counting: match self.run {
                Run::Idle => CountingState::Idle,
                Run::Since(tick) => CountingState::Since(tick),
                Run::Held(ticks) => CountingState::Held(ticks),
            },
            reload: self.reload,
            next: self
                .next
                .map(|(at, count)| NextCountState { at_tick: (at != u64::MAX).then_some(at), count }),
            written: self.written,
            low_byte: self.low,
            reads_high: self.high_next,
            latch: self.latch.map(|(count, bytes_left)| LatchState { count, bytes_left }),
            latched_status: self.status,
        }
    }
}

impl ChannelState {
    /// The counter, with its gate at `gate`, at tick `now`.
    pub(in super::super) fn restore(&self, gate: bool, now: u64) -> Result<Channel, Wrong> {
        at_most("mode", self.mode, 5u8)?;
        let run = match self.counting {
            CountingState::Idle => Run::Idle,
            CountingState::Since(tick) => {
                at_most("counting.since", tick, now)?;
                Run::Since(tick)
            }
            CountingState::Held(ticks) => {
                at_most("counting.held", ticks, now)?;
                ensure(!gate && matches!(self.mode, 0 | 4), "counting.held", || "the gate does not hold it")?;
                Run::Held(ticks)
            }
        };
        let next = match self.next {
            None => None,
            Some(next) => {
                let at = next.at_tick.unwrap_or(u64::MAX);
                ensure(at == u64::MAX || at <= now.saturating_add(MOST.into()), "next.at_tick", || {
                    format!("tick {at} is more than a period after tick {now}")
                })?;
                Some((at, count("next.count", next.count)?))
            }
        };
        let both = self.transfer == TransferState::Both;
        ensure(self.low_byte.is_none() || both, "low_byte", || "counts have one byte")?;
        if let Some(latch) = self.latch {
            let most = if both { 2 } else { 1 };
            ensure((1..=most).contains(&latch.bytes_left), "latch.bytes_left", || {
                format!("{} of {most}", latch.bytes_left)
            })?;
        }
        Ok(Channel {
            mode: self.mode,
            bytes: match self.transfer {
                TransferState::Low => Bytes::Low,
                TransferState::High => Bytes::High,
                TransferState::Both => Bytes::Both,
            },
            bcd: self.bcd,
            gate,
            run,
            reload: count("reload", self.reload)?,
            next,
            written: self.written,
            low: self.low_byte,
            high_next: self.reads_high,
            latch: self.latch.map(|latch| (latch.count, latch.bytes_left)),
            status: self.latched_status,
        })
    }
}
