//! A clock made of timer interrupts, as kernels of the 2000s kept it, for the skew lab: it tells the host
//! through the doorbell (ports 5C0h, 5C4h) once a second what it shows.
//!
//! Command line: `device=pit|rtc|hpet|lapic hz=100..1024 mode=count|compensate load=idle|spin|cli|io|job
//! seconds=S`. The machine ends with status 1, or 3 when the command line makes no sense.
//!
//! *count*: the clock is the number of interrupts times the period. *compensate*: as 2.6-era x86-64 Linux,
//! each interrupt compares the time-stamp counter with its reading at the last one. What is beyond one tick
//! is counted in whole microseconds; whole ticks of it were lost and are added, the rest is carried on. The
//! reading is taken back to the edge of the tick by the device's own count, where it has one (PIT, HPET, local
//! APIC; the RTC has none), but not past what is carried.
//!
//! A ring has the values: interrupts counted (lost ones included), passes of the job, lost ticks found,
//! nanoseconds that the ring before took, the clock in nanoseconds.
#![no_std]
#![no_main]

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use kit::cpu::{self, rdtsc};
use kit::io::{self, in8, out8, out32, read32, read64, write32, write64};
use kit::trap::{self, Frame};
use kit::{Global, apic, boot, clock, println};

kit::guest!(main);

const HPET: u64 = 0xfed0_0000;
const IOAPIC: u64 = 0xfec0_0000;
const DOORBELL_VALUE: u16 = 0x5c0;
const DOORBELL_RING: u16 = 0x5c4;
const VECTOR: u8 = 0x50;
/// IOAPIC pins.
const PIN_PIT: u32 = 2;
const PIN_RTC: u32 = 8;
const PIN_HPET: u32 = 20;
/// A ring that took longer was disturbed and is repeated so often at most.
const UNDISTURBED_NS: u64 = 60_000;
const TRIES: u32 = 4;
/// The first and the last one.
const MANY: u32 = 1000;
const LAST_SECOND_MS: u64 = 1100;

#[derive(Clone, Copy, PartialEq)]
enum Device {
    Pit,
    Rtc,
    Hpet,
    Lapic,
}

/// What the handler works with.
#[derive(Clone, Copy)]
struct State {
    device: Device,
    compensate: bool,
    /// The device's count for one tick.
    reload: u64,
    /// Nanoseconds of one tick, as a fraction.
    period: (u64, u64),
    /// Nanoseconds of one tick as the guest's kernel takes it.
    tick_ns: u64,
    tsc_khz: u64,
    ticks: u64,
    lost: u64,
    /// Time-stamp counter at which the last accounted tick was due.
    last: u64,
    /// Clock at which to ring next.
    ring_at: u64,
    sequence: u32,
    /// Nanoseconds of the last ring.
    trip: u64,
    /// Time-stamp counter at which to end.
    end: u64,
}

static STATE: Global<Option<State>> = Global::new(None);
static PASSES: AtomicU64 = AtomicU64::new(0);
static OVER: AtomicBool = AtomicBool::new(false);

fn on_tick(_frame: &mut Frame) {
    let Some(mut state) = STATE.get() else { return };
    // First the acknowledgement, so that the next tick can be pending meanwhile.
    if state.device == Device::Rtc {
        cmos(0xc);
    }
    apic::eoi();
    if state.compensate {
        state.account();
    }
    let now = rdtsc();
    state.ticks += 1;
    let last = now >= state.end;
    // More often towards the end: one of them will meet no backlog.
    let step = if now + LAST_SECOND_MS * state.tsc_khz >= state.end { 100_000_000 } else { 1_000_000_000 };
    if last || state.clock(now) >= state.ring_at {
        let mut tries = 0;
        loop {
            // How long a ring took is told by the next: the last good one needs one more.
            let told = tries > 0 && state.trip <= UNDISTURBED_NS;
            state.ring();
            tries += 1;
            let good = if last { told } else { state.trip <= UNDISTURBED_NS };
            if good || tries >= if last { MANY } else { TRIES } {
                break;
            }
        }
        state.ring_at = (state.clock(rdtsc()) / step + 1) * step;
    }
    STATE.set(Some(state));
    if last {
        OVER.store(true, SeqCst);
    }
}

impl State {
    fn us(&self, cycles: u64) -> u64 {
        cycles * 1000 / self.tsc_khz
    }

    fn cycles(&self, us: u64) -> u64 {
        us * self.tsc_khz / 1000
    }

    /// Adds the ticks that were lost before this one and moves `last` to where this one was due.
    fn account(&mut self) {
        // In this order: an edge that passes between the two makes the tick younger, never older.
        let since_edge = self.since_edge();
        let now = rdtsc();
        let mut beyond = self.us(now.saturating_sub(self.last)).saturating_sub(self.tick_ns.div_ceil(1000));
        if beyond * 1000 > self.tick_ns {
            let lost = beyond * 1000 / self.tick_ns;
            self.lost += lost;
            self.ticks += lost;
            beyond = beyond * 1000 % self.tick_ns / 1000;
        }
        self.last = now.saturating_sub(since_edge);
        if self.us(now - self.last) < beyond {
            self.last = now.saturating_sub(self.cycles(beyond) + 1);
        }
    }

    /// Cycles since the device's last edge, by its own count.
    fn since_edge(&self) -> u64 {
        let count = match self.device {
            Device::Pit => {
                out8(0x43, 0);
                let left = u64::from(in8(0x40)) | u64::from(in8(0x40)) << 8;
                self.reload.saturating_sub(left)
            }
            Device::Hpet => {
                let edge = read64(HPET + 0x108).wrapping_sub(self.reload);
                read64(HPET + 0xf0).wrapping_sub(edge) % self.reload
            }
            Device::Lapic => self.reload.saturating_sub(apic::read(apic::TIMER_CURRENT).into()),
            Device::Rtc => 0,
        };
        // In parts of a tick, then in nanoseconds, then in cycles.
        let (num, den) = self.period;
        let ns = u128::from(count) * u128::from(num) / u128::from(den) / u128::from(self.reload);
        (ns * u128::from(self.tsc_khz) / 1_000_000) as u64
    }

    /// Nanoseconds that this clock shows.
    fn clock(&self, now: u64) -> u64 {
        let whole = (u128::from(self.ticks) * u128::from(self.period.0) / u128::from(self.period.1)) as u64;
        if self.compensate {
            whole + (u128::from(now.saturating_sub(self.last)) * 1_000_000 / u128::from(self.tsc_khz)) as u64
        } else {
            whole
        }
    }

    fn ring(&mut self) {
        let send = |value: u64| {
            out32(DOORBELL_VALUE, value as u32);
            out32(DOORBELL_VALUE, (value >> 32) as u32);
        };
        send(self.ticks);
        send(PASSES.load(SeqCst));
        send(self.lost);
        send(self.trip);
        let before = rdtsc();
        send(self.clock(before));
        out32(DOORBELL_RING, self.sequence);
        self.trip = (rdtsc() - before) * 1_000_000 / self.tsc_khz;
        self.sequence += 1;
    }
}

fn cmos(register: u8) -> u8 {
    out8(0x70, register);
    in8(0x71)
}
fn set_cmos(register: u8, value: u8) {
    out8(0x70, register);
    out8(0x71, value);
}

fn wrong(what: &str) -> ! {
    println!("FAIL tick: {what}");
    io::exit(1)
}

/// The value of `key=value` on the command line.
fn parameter(key: &str) -> Option<&'static str> {
    let mut words = boot::command_line().split_ascii_whitespace();
    words.find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
}

fn number(key: &str, default: u64, range: core::ops::RangeInclusive<u64>) -> u64 {
    match parameter(key).map(str::parse) {
        None => default,
        Some(Ok(value)) if range.contains(&value) => value,
        Some(_) => wrong(key),
    }
}

/// Leads IOAPIC pin `pin`, rising edges, to this processor.
fn route(pin: u32) {
    let write = |register: u32, value: u32| {
        write32(IOAPIC, register);
        write32(IOAPIC + 0x10, value);
    };
    write(0x11 + 2 * pin, apic::id() << 24);
    write(0x10 + 2 * pin, VECTOR.into());
}

/// Sets `device` up for about `hz`, all but the last register: its count for a tick and the nanoseconds of
/// one as a fraction.
fn prepare(device: Device, hz: u64, lapic_khz: u64) -> (u64, (u64, u64)) {
    let near = |rate: u64| (rate + hz / 2) / hz;
    match device {
        Device::Pit => {
            let count = near(clock::PIT_HZ);
            route(PIN_PIT);
            out8(0x43, 0x34);
            out8(0x40, count as u8);
            (count, (count * 1_000_000_000, clock::PIT_HZ))
        }
        Device::Rtc => {
            // 32768 Hz, halved some times.
            let Some(select) = (6..=9).find(|select| 32768 >> (select - 1) <= hz) else {
                wrong("hz is too low for the RTC")
            };
            route(PIN_RTC);
            set_cmos(0xa, 0x20 | select);
            set_cmos(0xb, cmos(0xb) & !0x70);
            cmos(0xc);
            (1, (1_000_000_000, 32768 >> (select - 1)))
        }
        Device::Hpet => {
            let femto = read64(HPET) >> 32;
            if femto == 0 || read32(HPET + 0x104) >> PIN_HPET & 1 == 0 {
                wrong("the HPET cannot interrupt at that pin");
            }
            let count = (1_000_000_000_000_000 / hz + femto / 2) / femto;
            route(PIN_HPET);
            write64(HPET + 0x10, 0);
            write64(HPET + 0xf0, 0);
            // Enabled, periodic, the next write sets the comparator, edge.
            write64(HPET + 0x100, 0x4 | 0x8 | 0x40 | u64::from(PIN_HPET) << 9);
            write64(HPET + 0x108, count);
            write64(HPET + 0x108, count);
            (count, (count * femto, 1_000_000))
        }
        Device::Lapic => {
            let count = near(lapic_khz * 1000);
            apic::write(apic::TIMER_DIVIDE, 0xb);
            apic::write(apic::LVT_TIMER, 0x2_0000 | u32::from(VECTOR));
            (count, (count * 1_000_000, lapic_khz))
        }
    }
}

/// The last register: now it runs.
fn start(device: Device, reload: u64) {
    match device {
        Device::Pit => out8(0x40, (reload >> 8) as u8),
        Device::Rtc => set_cmos(0xb, cmos(0xb) | 0x40),
        Device::Hpet => write64(HPET + 0x10, 1),
        Device::Lapic => apic::write(apic::TIMER_INITIAL, reload as u32),
    }
}

/// A fixed amount of work: some memory, some arithmetic, some branches.
fn job() {
    const LEN: usize = 4096;
    static WORDS: Global<[u32; LEN]> = Global::new([0; LEN]);
    // SAFETY: only this loop uses it.
    let words = unsafe { &mut *WORDS.ptr() };
    for round in 0..16u32 {
        let mut x = 0x9e37_79b9 ^ round;
        for word in words.iter_mut() {
            x ^= x << 13;
            x ^= x >> 17;
            x ^= x << 5;
            *word = if x & 1 == 0 { word.wrapping_add(x) } else { word.rotate_left(7) ^ x };
        }
    }
    PASSES.fetch_add(1, SeqCst);
}

fn main() {
    let device = match parameter("device") {
        None | Some("pit") => Device::Pit,
        Some("rtc") => Device::Rtc,
        Some("hpet") => Device::Hpet,
        Some("lapic") => Device::Lapic,
        Some(_) => wrong("device"),
    };
    let compensate = match parameter("mode") {
        None | Some("count") => false,
        Some("compensate") => true,
        Some(_) => wrong("mode"),
    };
    let load = parameter("load").unwrap_or("idle");
    let hz = number("hz", 1000, 100..=1024);
    let seconds = number("seconds", 3, 1..=1_000_000);
    // What the hypervisor says of its clocks, in kHz.
    if cpu::cpuid(0x4000_0000, 0)[0] < 0x4000_0010 {
        wrong("the machine does not say how fast its time-stamp counter is");
    }
    let [tsc_khz, lapic_khz, ..] = cpu::cpuid(0x4000_0010, 0).map(u64::from);
    if tsc_khz == 0 || lapic_khz == 0 {
        wrong("the machine's clocks stand still");
    }
    trap::handle(VECTOR, Some(on_tick));
    apic::enable();
    // The first ring tells when the clock was 0; it is made anew until nothing came between.
    let (mut sequence, mut trip) = (0, 0);
    loop {
        let (reload, period) = prepare(device, hz, lapic_khz);
        let before = rdtsc();
        start(device, reload);
        let mut state = State {
            device,
            compensate,
            reload,
            period,
            // The kernels that this is about took a thousandth for a thousandth, whatever the device does.
            tick_ns: if device == Device::Rtc { period.0 / period.1 } else { 1_000_000_000 / hz },
            tsc_khz,
            ticks: 0,
            lost: 0,
            last: rdtsc(),
            ring_at: 1_000_000_000,
            sequence,
            trip,
            end: before + seconds * 1000 * tsc_khz,
        };
        state.ring();
        state.trip = (rdtsc() - before) * 1_000_000 / tsc_khz;
        (sequence, trip) = (state.sequence, state.trip);
        STATE.set(Some(state));
        if trip <= UNDISTURBED_NS || sequence == MANY {
            break;
        }
    }
    let over = || OVER.load(SeqCst);
    match load {
        "idle" => {
            while !over() {
                cpu::sti_hlt_cli();
            }
        }
        "spin" => {
            cpu::sti();
            while !over() {}
        }
        "cli" => {
            let mut x = 0x2545_f491u64;
            while !over() {
                x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let window = (50 + (x >> 33) % 450) * tsc_khz / 1000;
                let start = rdtsc();
                while rdtsc() - start < window {}
                cpu::sti();
                let start = rdtsc();
                while rdtsc() - start < tsc_khz / 200 {}
                cpu::cli();
            }
        }
        "io" => {
            cpu::sti();
            while !over() {
                out8(0x80, 0x55);
            }
        }
        "job" => {
            cpu::sti();
            while !over() {
                job();
            }
        }
        _ => wrong("load"),
    }
    cpu::cli();
    let Some(state) = STATE.get() else { wrong("the clock is gone") };
    println!(
        "tick: {} ticks, {} of them found lost, {} passes",
        state.ticks,
        state.lost,
        PASSES.load(SeqCst)
    );
    io::exit(0)
}
