//! The host's clocks: the only place that reads them.
#![allow(unsafe_code)]

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::Nanos;

/// The host's time-stamp counter.
pub(crate) fn tsc() -> u64 {
    // SAFETY: RDTSC has no memory effects and is permitted to user code on every host we run on.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// What is known of the frequency of the host TSC.
static HZ: OnceLock<u64> = OnceLock::new();

/// The host's kernel says that the host TSC runs at `hz`: that is believed, and spares a measurement, if nobody has
/// asked before.
pub fn state_host_hz(hz: u64) {
    if hz > 100_000_000 {
        let _ = HZ.set(hz);
    }
}

/// Frequency of the host TSC in Hz: as somebody who knows it said ([`state_host_hz`]), as the hypervisor states it (CPUID 4000_0010h), as the processor
/// states it (CPUID 15h, Intel SDM vol. 2A), otherwise measured against the monotonic clock.
pub(crate) fn tsc_hz() -> u64 {
    *HZ.get_or_init(|| stated_hz().unwrap_or_else(measured_hz))
}

fn stated_hz() -> Option<u64> {
    use core::arch::x86_64::__cpuid;
    let hv = __cpuid(1).ecx & (1 << 31) != 0;
    if hv {
        let top = __cpuid(0x4000_0000).eax;
        if (0x4000_0010..0x4000_1000).contains(&top) {
            let khz = __cpuid(0x4000_0010).eax;
            if khz > 100_000 {
                return Some(u64::from(khz) * 1000);
            }
        }
        return None; // leaf 15h of a virtual processor often describes another one
    }
    if __cpuid(0).eax < 0x15 {
        return None;
    }
    let leaf = __cpuid(0x15);
    (leaf.eax != 0 && leaf.ebx != 0 && leaf.ecx != 0)
        .then(|| u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax))
}

/// The tightest of several (TSC, monotonic clock) pairs.
fn pair() -> (u64, Instant) {
    (0..16)
        .map(|_| {
            let before = tsc();
            let at = Instant::now();
            let after = tsc();
            (after - before, before + (after - before) / 2, at)
        })
        .min_by_key(|sample| sample.0)
        .map_or_else(|| (tsc(), Instant::now()), |(_, tsc, at)| (tsc, at))
}

fn measured_hz() -> u64 {
    let (tsc0, at0) = pair();
    std::thread::sleep(Duration::from_millis(10));
    let (tsc1, at1) = pair();
    let ns = at1.duration_since(at0).as_nanos().max(1);
    let hz = (u128::from(tsc1 - tsc0) * 1_000_000_000 / ns) as u64;
    // Round to 10 kHz: the quartz is good to that, the measurement is not better.
    (hz + 5_000) / 10_000 * 10_000
}

/// Host wall clock now, in nanoseconds since the Unix epoch.
#[must_use]
pub fn wall() -> Nanos {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Nanos(since.as_nanos() as u64)
}

/// The host's time-stamp counter, for accounts of our own work: it runs on while the machine is paused.
#[must_use]
pub fn host_ticks() -> u64 {
    tsc()
}

/// Their rate in Hz.
#[must_use]
pub fn host_hz() -> u64 {
    tsc_hz()
}

/// Nanoseconds of a span of [`host_ticks`].
#[must_use]
pub fn ticks_to_nanos(ticks: u64) -> Nanos {
    Nanos((u128::from(ticks) * 1_000_000_000 / u128::from(tsc_hz())) as u64)
}

fn clock(id: libc::clockid_t) -> Nanos {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid place for the result.
    unsafe { libc::clock_gettime(id, &raw mut now) };
    Nanos(now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64)
}

/// The host's raw monotonic clock (`CLOCK_MONOTONIC_RAW`), which nobody slews: what a guest's clocks are
/// measured against. Zero where the host has none.
#[must_use]
pub fn raw() -> Nanos {
    clock(libc::CLOCK_MONOTONIC_RAW)
}

/// CPU time of this process.
pub(crate) fn cpu_time() -> Nanos {
    clock(libc::CLOCK_PROCESS_CPUTIME_ID)
}

/// CPU time of the calling thread.
pub(crate) fn thread_time() -> Nanos {
    clock(libc::CLOCK_THREAD_CPUTIME_ID)
}

/// How long the host was suspended since it was booted.
pub(crate) fn time_suspended() -> Nanos {
    clock(libc::CLOCK_BOOTTIME).saturating_sub(clock(libc::CLOCK_MONOTONIC))
}

/// What the host's scheduler did with a thread so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ThreadTime {
    /// It ran.
    pub ran: Nanos,
    /// It was runnable and did not run: what a guest calls stolen time.
    pub delayed: Nanos,
}

/// The time that the calling thread ran, and that it was runnable but not run by the host's scheduler. Read
/// from `/proc/thread-self/schedstat`: first and second field, nanoseconds.
#[derive(Debug)]
pub struct RunDelay {
    file: Option<std::fs::File>,
}

impl RunDelay {
    /// Opens the account of the calling thread; read it from that thread or from any other.
    #[must_use]
    pub fn of_this_thread() -> RunDelay {
        RunDelay { file: std::fs::File::open("/proc/thread-self/schedstat").ok() }
    }

    /// The times so far; `None` if the host does not account them.
    #[must_use]
    pub fn times(&self) -> Option<ThreadTime> {
        use std::os::unix::fs::FileExt;
        let mut text = [0u8; 96];
        let len = self.file.as_ref()?.read_at(&mut text, 0).ok()?;
        let mut fields = std::str::from_utf8(&text[..len]).ok()?.split_ascii_whitespace();
        let mut next = || fields.next()?.parse().ok().map(Nanos);
        Some(ThreadTime { ran: next()?, delayed: next()? })
    }

    /// The delay so far; zero if the host does not account it.
    #[must_use]
    pub fn read(&self) -> Nanos {
        self.times().unwrap_or_default().delayed
    }
}

/// Asks the host not to delay the calling thread's sleeps beyond their deadline (`PR_SET_TIMERSLACK`).
pub fn set_timer_slack() {
    // SAFETY: prctl with PR_SET_TIMERSLACK takes an integer and touches no memory.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1u64, 0, 0, 0) };
}
