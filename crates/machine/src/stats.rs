//! Counters and latency histograms of exits.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;
use wardian_cpu::Exit;

use crate::accounts::{Phase, TimeSpent};
use crate::board::Board;

/// The kinds of exits, in the order of [`NAMES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Port read.
    PortIn,
    /// Port write.
    PortOut,
    /// Memory-mapped read.
    MmioRead,
    /// Memory-mapped write.
    MmioWrite,
    /// RDMSR.
    MsrRead,
    /// WRMSR.
    MsrWrite,
    /// HLT; its latency is the sleep.
    Halt,
    /// Triple fault.
    Shutdown,
    /// VMCALL.
    Hypercall,
    /// Debugger.
    Debug,
    /// Kick.
    Interrupted,
    /// A timer's instruction, where time is counted in instructions.
    Limit,
}

/// Names of the kinds.
pub const NAMES: [&str; 12] = [
    "port-in",
    "port-out",
    "mmio-read",
    "mmio-write",
    "msr-read",
    "msr-write",
    "halt",
    "shutdown",
    "hypercall",
    "debug",
    "interrupted",
    "limit",
];

impl Kind {
    /// What the thread of a vCPU is at after an exit of this kind.
    pub(crate) fn phase(self) -> Phase {
        match self {
            Kind::Halt => Phase::Halted,
            Kind::Debug => Phase::Resting,
            _ => Phase::Exit,
        }
    }

    /// The kind of `exit`.
    #[must_use]
    pub fn of(exit: &Exit) -> Kind {
        match exit {
            Exit::PortIn { .. } => Kind::PortIn,
            Exit::PortOut { .. } => Kind::PortOut,
            Exit::MmioRead { .. } => Kind::MmioRead,
            Exit::MmioWrite { .. } => Kind::MmioWrite,
            Exit::MsrRead { .. } => Kind::MsrRead,
            Exit::MsrWrite { .. } => Kind::MsrWrite,
            Exit::Halt => Kind::Halt,
            Exit::Shutdown => Kind::Shutdown,
            Exit::Hypercall { .. } => Kind::Hypercall,
            Exit::Debug(_) => Kind::Debug,
            Exit::Interrupted => Kind::Interrupted,
            Exit::Limit => Kind::Limit,
        }
    }
}

/// Powers of two of TSC ticks.
const BUCKETS: usize = 48;

#[derive(Debug)]
struct Row {
    ticks: AtomicU64,
    buckets: [AtomicU64; BUCKETS],
}

/// What one vCPU's exits cost. Written by its thread alone, read by anybody.
#[derive(Debug)]
pub struct ExitStats {
    rows: [Row; NAMES.len()],
}

impl Default for ExitStats {
    fn default() -> ExitStats {
        let row = || Row { ticks: AtomicU64::new(0), buckets: std::array::from_fn(|_| AtomicU64::new(0)) };
        ExitStats { rows: std::array::from_fn(|_| row()) }
    }
}

/// One writer, so no locked instruction is needed.
pub(crate) fn add(cell: &AtomicU64, by: u64) {
    cell.store(cell.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
}

impl ExitStats {
    /// One exit of `kind` took `ticks` of the TSC from exit to answer.
    pub fn record(&self, kind: Kind, ticks: u64) {
        let row = &self.rows[kind as usize];
        let bucket = (64 - ticks.leading_zeros() as usize).min(BUCKETS - 1);
        add(&row.buckets[bucket], 1);
        add(&row.ticks, ticks);
    }

    /// Adds what `other` counted.
    pub fn add(&self, other: &ExitStats) {
        for (to, from) in self.rows.iter().zip(&other.rows) {
            add(&to.ticks, from.ticks.load(Ordering::Relaxed));
            for (to, from) in to.buckets.iter().zip(&from.buckets) {
                add(to, from.load(Ordering::Relaxed));
            }
        }
    }

    /// A summary for each kind that occurred, with the TSC at `hz`.
    #[must_use]
    pub fn summary(&self, hz: u64) -> Vec<ExitSummary> {
        let ns = |ticks: u128| (ticks * 1_000_000_000 / u128::from(hz.max(1))) as u64;
        let mut all = Vec::new();
        for (name, row) in NAMES.iter().zip(&self.rows) {
            let buckets: Vec<u64> = row.buckets.iter().map(|b| b.load(Ordering::Relaxed)).collect();
            let count: u64 = buckets.iter().sum();
            if count == 0 {
                continue;
            }
            let quantile = |per_cent: u64| {
                let mut left = (count * per_cent).div_ceil(100).max(1);
                let bucket = buckets.iter().position(|in_bucket| {
                    let found = left <= *in_bucket;
                    left = left.saturating_sub(*in_bucket);
                    found
                });
                ns(1 << bucket.unwrap_or(BUCKETS - 1))
            };
            all.push(ExitSummary {
                kind: (*name).to_owned(),
                count,
                total_ns: ns(u128::from(row.ticks.load(Ordering::Relaxed))),
                p50_ns: quantile(50),
                p99_ns: quantile(99),
                max_ns: quantile(100),
            });
        }
        all
    }
}

/// One kind of exit. The quantiles are upper bounds, true to a factor of two.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ExitSummary {
    /// Name of the kind.
    pub kind: String,
    /// How many.
    pub count: u64,
    /// Time from exit to answer, all together, in nanoseconds.
    pub total_ns: u64,
    /// Median.
    pub p50_ns: u64,
    /// 99th percentile.
    pub p99_ns: u64,
    /// Longest.
    pub max_ns: u64,
}

/// One vCPU's share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VcpuStats {
    /// Number of the vCPU.
    pub vcpu: usize,
    /// Where the time of its thread went.
    pub time: TimeSpent,
    /// Its exits.
    pub exits: Vec<ExitSummary>,
    /// The engine's own counters.
    pub engine: BTreeMap<String, u64>,
}

/// Everything that was counted, reboots included.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Name of the machine.
    pub name: String,
    /// Name of the engine.
    pub engine: String,
    /// Guest time since the last reset, in nanoseconds.
    pub guest_ns: u64,
    /// Resets.
    pub reboots: u64,
    /// By vCPU.
    pub vcpus: Vec<VcpuStats>,
    /// What became of the ticks of each timer of the last life, such as `pit.ticks`: delivered, replayed,
    /// missed, masked, coalesced, stepped, backlog, latest_ns. Timers that never ticked are left out.
    pub timers: TimerStats,
}

/// Counters of timers, by name.
pub type TimerStats = BTreeMap<String, BTreeMap<String, u64>>;

/// The counters of ticks among what `board`'s timers tell of themselves.
pub(crate) fn timers(board: &Board) -> TimerStats {
    let mut all = TimerStats::new();
    let regions = board.ports.regions().chain(board.mmio.regions());
    for (_, device) in regions.filter(|(_, device)| ["pit", "rtc", "hpet", "lapic"].contains(&device.name()))
    {
        for (name, value) in device.inspect() {
            if let Some((timer, counter)) = name.rsplit_once('/')
                && let Ok(value) = value.parse()
            {
                all.entry(format!("{}.{timer}", device.name()))
                    .or_default()
                    .insert(counter.to_owned(), value);
            }
        }
    }
    all.retain(|_, counters| counters.get("delivered").is_some_and(|delivered| *delivered > 0));
    all
}

#[cfg(test)]
mod tests {
    use super::{ExitStats, Kind};

    #[test]
    fn quantiles_are_upper_bounds() {
        let stats = ExitStats::default();
        for _ in 0..98 {
            stats.record(Kind::PortOut, 100);
        }
        stats.record(Kind::PortOut, 5000);
        stats.record(Kind::PortOut, 0);
        stats.record(Kind::Halt, u64::MAX);
        let summary = stats.summary(1_000_000_000);
        assert_eq!(summary.len(), 2);
        let out = &summary[0];
        assert_eq!((out.kind.as_str(), out.count, out.total_ns), ("port-out", 100, 14_800));
        assert_eq!((out.p50_ns, out.p99_ns, out.max_ns), (128, 128, 8192));
        let twice = ExitStats::default();
        twice.add(&stats);
        twice.add(&stats);
        assert_eq!(twice.summary(1_000_000_000)[0].count, 200);
    }
}
