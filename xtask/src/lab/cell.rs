//! What is measured: one cell is one guest with one timer, under one policy and one load, from one seed.

use std::fmt;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// What becomes of ticks that were not delivered in time (`--timer-policy`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// Guest time waits for the missed ticks.
    Delay,
    /// Every missed tick is delivered.
    Replay,
    /// Likewise, a few at a time.
    ReplaySlew,
    /// None of the missed ticks (SYNC).
    Sync,
    /// One of the missed ticks (MIXED).
    LateOne,
    /// One of them, and the grid moves (ASYNC).
    Async,
    /// None is named: what the machine does by itself.
    Default,
}

impl Policy {
    /// Whether it promises to deliver every tick.
    pub fn conserves(self) -> bool {
        matches!(self, Policy::Delay | Policy::Replay | Policy::ReplaySlew)
    }
}

/// Which timer ticks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Device {
    Pit,
    Rtc,
    Hpet,
    Lapic,
    /// Whatever the guest takes.
    Any,
}

/// Which guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Guest {
    /// Bare metal, counts ticks.
    Count,
    /// Bare metal, counts ticks and compensates by the TSC as 2.6-era x86-64 Linux.
    Compensate,
    /// Debian's kernel as it comes: kvm-clock.
    Linux,
    /// Debian's kernel that counts ticks: clocksource=jiffies.
    LinuxJiffies,
    /// Debian's kernel with clocksource=hpet.
    LinuxHpet,
    /// Debian's kernel with clocksource=acpi_pm.
    LinuxPm,
}

impl Guest {
    pub fn is_linux(self) -> bool {
        !matches!(self, Guest::Count | Guest::Compensate)
    }

    /// Whether the timer's device is to be chosen.
    pub fn has_device(self) -> bool {
        matches!(self, Guest::Count | Guest::Compensate | Guest::LinuxJiffies)
    }

    /// Kernel parameters of a Linux guest.
    pub fn parameters(self, device: Device) -> &'static str {
        match (self, device) {
            // Linux sets no PIT up where the local APIC has TSC deadlines, whether it may use them or not.
            (Guest::LinuxJiffies, Device::Pit) => {
                "clocksource=jiffies nohz=off highres=off notsc no-kvmclock nolapic_timer lapic=notscdeadline \
                 hpet=disable"
            }
            (Guest::LinuxJiffies, Device::Hpet) => {
                "clocksource=jiffies nohz=off highres=off notsc no-kvmclock nolapic_timer"
            }
            (Guest::LinuxJiffies, _) => {
                "clocksource=jiffies nohz=off highres=off notsc no-kvmclock lapic=notscdeadline"
            }
            (Guest::LinuxHpet, _) => "clocksource=hpet tsc=unstable no-kvmclock",
            (Guest::LinuxPm, _) => "clocksource=acpi_pm tsc=unstable no-kvmclock",
            _ => "",
        }
    }
}

/// What happens on the host meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Load {
    /// Nothing of ours.
    None,
    /// Two busy guests on each core.
    Cpu2,
    /// Three busy guests on each core.
    Cpu3,
    /// A Linux guest reads its disk on the same core (a Linux guest: reads its own).
    Disk,
    /// Stops of 1 ms to 5 s at random, half of the time altogether.
    Stop,
    /// Half of a processor by the host's scheduler, in periods of 10 ms.
    Cgroup10,
    /// Likewise, in periods of 100 ms.
    Cgroup100,
    /// One pause of the machine of 30 s, or a third of the run if that is shorter; the guest keeps the host's time.
    Pause,
}

impl Load {
    /// Busy guests on each core.
    pub fn share(self) -> Option<usize> {
        match self {
            Load::Cpu2 => Some(2),
            Load::Cpu3 => Some(3),
            _ => None,
        }
    }
}

/// What the guest does beside keeping time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activity {
    /// HLT.
    Idle,
    /// A loop.
    Spin,
    /// Interrupts off for 50 to 500 us, again and again.
    Cli,
    /// Port writes without end.
    Io,
    /// A fixed job, counted in passes.
    Job,
}

/// One measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Cell {
    pub load: Load,
    pub guest: Guest,
    pub device: Device,
    pub policy: Policy,
    pub activity: Activity,
    /// Ticks per second asked for.
    pub hz: u64,
    /// Length.
    pub seconds: u64,
    pub seed: u64,
}

/// The name that the command line has for a value.
pub fn word(value: &impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

impl Cell {
    /// Of these, the part during which the load is on: then what is owed may be paid.
    pub fn loaded(&self) -> u64 {
        self.seconds - (self.seconds / 5).clamp(1, 10).min(self.seconds - 1)
    }
}

/// As a file's name; all but the length.
impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}-{}-{}-{}-{}-{}hz-{}s-{}",
            word(&self.policy),
            word(&self.device),
            word(&self.guest),
            word(&self.load),
            word(&self.activity),
            self.hz,
            self.seconds,
            self.seed
        )
    }
}

/// What is asked for; what is empty was not.
pub struct Wanted<'a> {
    pub policies: &'a [Policy],
    pub devices: &'a [Device],
    pub guests: &'a [Guest],
    pub loads: &'a [Load],
    pub activities: &'a [Activity],
    pub seeds: u64,
    pub hz: u64,
    pub seconds: u64,
}

impl Wanted<'_> {
    /// All cells, seeds outermost (so that policies are measured in turn), then loads.
    pub fn cells(&self) -> Vec<Cell> {
        let mut cells = Vec::new();
        for seed in 1..=self.seeds {
            for &load in self.loads {
                for &guest in self.guests {
                    for &device in self.devices {
                        for &policy in self.policies {
                            self.add(
                                &mut cells,
                                Cell {
                                    seed,
                                    load,
                                    guest,
                                    device,
                                    policy,
                                    activity: Activity::Idle,
                                    hz: self.hz,
                                    seconds: self.seconds,
                                },
                            );
                        }
                    }
                }
            }
        }
        cells
    }

    fn add(&self, cells: &mut Vec<Cell>, mut cell: Cell) {
        if cell.guest.has_device() {
            // Linux's /dev/rtc has used other timers for long: its tick is never the RTC's.
            if cell.device == Device::Any || cell.guest.is_linux() && cell.device == Device::Rtc {
                return;
            }
        } else {
            // No tick that counts: neither device nor policy matter.
            (cell.device, cell.policy) = (Device::Any, Policy::Default);
        }
        if cell.guest.is_linux() {
            cell.hz = 250;
        } else if cell.device == Device::Rtc {
            cell.hz = 1 << cell.hz.ilog2().max(7);
            if cell.hz < self.hz.min(1000) {
                cell.hz = (cell.hz * 2).min(1024);
            }
        }
        let by_load = match cell.load {
            Load::None | Load::Disk | Load::Pause => Activity::Idle,
            _ => Activity::Spin,
        };
        let activities = if self.activities.is_empty() { &[by_load][..] } else { self.activities };
        for &activity in activities {
            let cell = Cell { activity, ..cell };
            // A Linux guest idles or spins.
            let possible = !cell.guest.is_linux() || matches!(activity, Activity::Idle | Activity::Spin);
            if possible && !cells.contains(&cell) {
                cells.push(cell);
            }
        }
    }
}

/// Groups of cells that are measured at once: those that are load to each other.
pub fn batches(cells: Vec<Cell>, cores: usize) -> Vec<Vec<Cell>> {
    let mut batches: Vec<Vec<Cell>> = Vec::new();
    for cell in cells {
        let room = cell.load.share().map_or(1, |share| share * cores);
        match batches.last_mut() {
            Some(last) if last.len() < room && last[0].load == cell.load && last[0].seed == cell.seed => {
                last.push(cell);
            }
            _ => batches.push(vec![cell]),
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Wanted<'_> = Wanted {
        policies: &[Policy::Sync, Policy::Replay],
        devices: &[Device::Pit, Device::Rtc],
        guests: &[Guest::Count, Guest::Linux, Guest::LinuxJiffies],
        loads: &[Load::None, Load::Cpu3],
        activities: &[],
        seeds: 2,
        hz: 1000,
        seconds: 20,
    };

    #[test]
    fn cells_that_make_sense_and_no_others() {
        let cells = ALL.cells();
        // For each seed and load: 4 of count, 1 of Linux, 2 of jiffies (no RTC).
        assert_eq!(cells.len(), 2 * 2 * 7);
        assert!(cells.iter().all(|cell| cell.guest != Guest::Linux || cell.policy == Policy::Default));
        assert!(cells.iter().all(|cell| cell.device != Device::Rtc || cell.hz == 1024));
        assert!(cells.iter().all(|cell| (cell.activity == Activity::Spin) == (cell.load == Load::Cpu3)));
        let mut names: Vec<String> = cells.iter().map(Cell::to_string).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), cells.len());
        assert_eq!(cells[0].to_string(), "sync-pit-count-none-idle-1000hz-20s-1");
    }

    #[test]
    fn only_load_to_each_other_runs_at_once() {
        let batches = batches(ALL.cells(), 2);
        for batch in &batches {
            assert!(batch.len() == 1 || batch[0].load == Load::Cpu3 && batch.len() <= 6);
            assert!(batch.iter().all(|cell| cell.load == batch[0].load && cell.seed == batch[0].seed));
        }
        // Alone 7, then 6 and 1 for each seed.
        assert_eq!(batches.len(), 2 * (7 + 2));
    }

    #[test]
    fn the_load_ends_before_the_run() {
        let mut cell = ALL.cells()[0];
        for (seconds, loaded) in [(2, 1), (5, 4), (20, 16), (1200, 1190)] {
            cell.seconds = seconds;
            assert_eq!(cell.loaded(), loaded);
        }
    }
}
