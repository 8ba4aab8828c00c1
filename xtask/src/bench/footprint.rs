//! Memory and CPU time of a process, from `/proc` (proc(5)).

use std::fs;
use std::time::Duration;

use serde::Serialize;

/// Memory that a VMM takes beside guest RAM, in KiB.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize)]
pub struct Memory {
    /// Resident, shared pages by their share: what a page mapped twice costs is counted once.
    pub pss: u64,
    /// Resident, as often as mapped.
    pub rss: u64,
    /// Resident guest RAM (by its share), for comparison; in neither of the above.
    pub guest: u64,
    /// Page tables that the host's kernel keeps for the process; in none of the above.
    pub page_tables: u64,
}

/// The greatest of many measurements, each figure by itself.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize)]
pub struct Peak {
    #[serde(flatten)]
    pub memory: Memory,
    pub samples: u32,
}

impl Peak {
    pub fn take(&mut self, now: Memory) {
        self.memory.pss = self.memory.pss.max(now.pss);
        self.memory.rss = self.memory.rss.max(now.rss);
        self.memory.guest = self.memory.guest.max(now.guest);
        self.memory.page_tables = self.memory.page_tables.max(now.page_tables);
        self.samples += 1;
    }
}

/// Measures the process now; None when it is gone.
pub fn measure(pid: u32) -> Option<Memory> {
    let mut memory = beside_guest(&fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?);
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    memory.page_tables = status.lines().find_map(|line| kib(line, "VmPTE:")).unwrap_or(0);
    Some(memory)
}

/// Sums up `smaps`, guest RAM apart. Its mappings are those of the memfd `wardian-guest` in our machines, of
/// QEMU's memfd backend in QEMU's.
fn beside_guest(smaps: &str) -> Memory {
    let (mut memory, mut guest) = (Memory::default(), false);
    for line in smaps.lines() {
        if let Some(pss) = kib(line, "Pss:") {
            *(if guest { &mut memory.guest } else { &mut memory.pss }) += pss;
        } else if let Some(rss) = kib(line, "Rss:") {
            memory.rss += if guest { 0 } else { rss };
        } else if line.split(' ').next().is_some_and(|range| range.contains('-')) {
            guest = line.contains("/memfd:wardian-guest") || line.contains("/memfd:memory-backend-memfd");
        }
    }
    memory
}

fn kib(line: &str, name: &str) -> Option<u64> {
    line.strip_prefix(name)?.trim().strip_suffix(" kB")?.parse().ok()
}

/// User and system time of all threads of the process; None when it is gone.
pub fn cpu_time(pid: u32) -> Option<Duration> {
    ticks(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
        .map(|ticks| Duration::from_millis(ticks * 10))
}

/// `utime + stime` in hundredths of a second (USER_HZ is 100 on x86-64).
fn ticks(stat: &str) -> Option<u64> {
    // The name in parentheses may hold anything.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_apart() {
        let smaps = "\
7f0000000000-7f0020000000 rw-s 00000000 00:01 7   /memfd:wardian-guest (deleted)
Size:             524288 kB
Rss:              100000 kB
Pss:               50000 kB
Pss_Dirty:         50000 kB
VmFlags: rd wr sh
7f0030000000-7f0030100000 rw-p 00000000 00:00 0
Rss:                 900 kB
Pss:                 800 kB
7f0040000000-7f0040100000 r-xs 00000000 00:01 8   /memfd:code (deleted)
Rss:                  40 kB
Pss:                  20 kB
";
        let memory = Memory { pss: 820, rss: 940, guest: 50000, page_tables: 0 };
        assert_eq!(beside_guest(smaps), memory);
        let mut peak = Peak::default();
        peak.take(memory);
        peak.take(Memory { pss: 1, rss: 2000, guest: 3, page_tables: 4 });
        let most = Memory { pss: 820, rss: 2000, guest: 50000, page_tables: 4 };
        assert_eq!(peak, Peak { memory: most, samples: 2 });
    }

    #[test]
    fn cpu_time_of_odd_names() {
        assert_eq!(ticks("12 (a) b) S 1 12 12 0 -1 4194304 100 0 0 0 37 5 0 0 20 0 4"), Some(42));
        assert_eq!(ticks("12"), None);
        assert!(measure(std::process::id()).is_some_and(|memory| memory.pss > 0 && memory.guest == 0));
        assert!(cpu_time(std::process::id()).is_some());
    }
}
