//! The clocks of a PC against each other, and the interrupts that they raise: PIT, RTC, HPET, ACPI timer,
//! TSC, local APIC timer in all its modes (Intel SDM vol. 3A, 12.5.4; 8254 and MC146818 data sheets; HPET
//! specification 1.0a; ACPI specification 4.8.2.1).
#![no_std]
#![no_main]

use core::sync::atomic::{AtomicU32, Ordering::SeqCst};

use kit::cpu::{self, msr, rdtsc};
use kit::io::{in8, in32, out8, read32, read64, write32, write64};
use kit::trap::{self, Frame};
use kit::{Global, apic, check, clock, eq, println, report};

kit::guest!(main);

const HPET: u64 = 0xfed0_0000;
const IOAPIC: u64 = 0xfec0_0000;
/// IRQ 0 and 8 as the PICs are set up here, IOAPIC pins, the local timer.
const PIC_TIMER: u8 = 0x20;
const PIC_RTC: u8 = 0x28;
const PIN: u8 = 0x50;
const LOCAL: u8 = 0x60;

static HITS: [AtomicU32; 256] = [const { AtomicU32::new(0) }; 256];

fn hits(vector: u8) -> u32 {
    HITS[usize::from(vector)].load(SeqCst)
}
fn clear(vector: u8) {
    HITS[usize::from(vector)].store(0, SeqCst);
}
fn hit(frame: &mut Frame) {
    HITS[frame.vector as usize & 255].fetch_add(1, SeqCst);
    match frame.vector as u8 {
        PIC_TIMER => out8(0x20, 0x20),
        PIC_RTC => {
            cmos(0xc);
            out8(0xa0, 0x20);
            out8(0x20, 0x20);
        }
        _ => apic::eoi(),
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

/// Whether `got` is `wanted` by so many percent.
fn near(what: &str, wanted: u64, got: u64, percent: u64) {
    if got.abs_diff(wanted) * 100 <= wanted * percent {
        report::pass(what);
    } else {
        report::fail(what, format_args!("expected {wanted} by {percent} %, got {got}"));
    }
}

/// Whether interrupts every `period` microseconds over `us` were so many. On a busy host a virtual machine
/// loses many, but none is made up.
fn ticks(what: &str, us: u64, period: u64, got: u32) {
    let (wanted, got) = (us / period, u64::from(got));
    if got >= wanted / 10 && got <= wanted + wanted / 20 + 2 {
        report::pass(what);
    } else {
        report::fail(what, format_args!("expected {wanted} or somewhat less, got {got}"));
    }
}

static TSC_MHZ: Global<u64> = Global::new(1);

/// Microseconds of the TSC since `start`.
fn since(start: u64) -> u64 {
    (rdtsc() - start) / TSC_MHZ.get()
}

/// Lets interrupts come for `ms` milliseconds of the PIT; returns how many microseconds it took by the TSC.
fn for_ms(ms: u64) -> u64 {
    let start = rdtsc();
    cpu::sti();
    clock::wait_ms(ms);
    cpu::cli();
    since(start)
}

/// Lets interrupts come until there was one at `vector`, for two seconds at most, and a while longer; returns
/// how many there were.
fn one(vector: u8) -> u32 {
    let start = rdtsc();
    cpu::sti();
    while hits(vector) == 0 && since(start) < 2_000_000 {}
    cpu::cli();
    for_ms(20);
    hits(vector)
}

/// That nothing was to come yet, if it did not take `us` long enough for it to be due.
fn not_yet(what: &str, us: u64, due: u64, got: u32, wanted: u32) {
    if us < due {
        eq(what, wanted, got);
    } else {
        report::skip(what, "the host was busy for too long");
    }
}

fn main() {
    // QEMU's clock keeps no flag while its interrupt is off.
    report::tcg_fails(&["RTC: flag without interrupt"]);
    for vector in [PIC_TIMER, PIC_RTC, PIN, LOCAL] {
        trap::handle(vector, Some(hit));
    }
    apic::enable();
    // ExtINT at LINT0: the PICs are heard.
    apic::write(apic::LVT_LINT0, 0x700);
    rates();
    pit();
    ioapic();
    rtc();
    hpet();
    local();
    deadline();
}

/// All free-running counters at one moment: PIT counter 2, TSC, HPET, ACPI timer.
fn sample(pm: Option<u16>) -> [u64; 4] {
    let mut best = ([0; 4], u64::MAX);
    for _ in 0..20 {
        let before = rdtsc();
        out8(0x43, 0x80);
        let hpet = read64(HPET + 0xf0);
        let pm = pm.map_or(0, |port| u64::from(in32(port)) & 0xff_ffff);
        let after = rdtsc();
        let pit = u64::from(in8(0x42)) | u64::from(in8(0x42)) << 8;
        if after - before < best.1 {
            best = ([pit, before + (after - before) / 2, hpet, pm], after - before);
        }
    }
    best.0
}

/// The free-running counters against the PIT.
fn rates() {
    let pm = acpi_timer();
    let period = read64(HPET) >> 32;
    write64(HPET + 0x10, read64(HPET + 0x10) & !3 | 1);
    // Counter 2 runs freely: mode 2, 65536.
    out8(0x61, in8(0x61) & !2 | 1);
    out8(0x43, 0xb4);
    out8(0x42, 0);
    out8(0x42, 0);
    let before = sample(pm);
    let mut after = before;
    // Below its period of 55 ms.
    while before[0].wrapping_sub(after[0]) & 0xffff < 50_000 {
        after = sample(pm);
    }
    // On a busy host the window may be longer than the period; the HPET tells by how many.
    let hpet = (u128::from(after[2] - before[2]) * u128::from(period) / 1_000_000_000) as u64;
    let part = (before[0].wrapping_sub(after[0]) & 0xffff) * 1_000_000 / clock::PIT_HZ;
    let us = part + (hpet.saturating_sub(part) + 27_462) / 54_925 * 54_925;
    let mhz = (after[1] - before[1]) / us;
    println!("TSC {mhz} MHz");
    check("TSC runs", mhz > 0);
    TSC_MHZ.set(mhz.max(1));
    near("HPET against PIT", us, hpet, 2);
    match pm {
        Some(_) => {
            let pm = (after[3].wrapping_sub(before[3]) & 0xff_ffff) * 1_000_000 / 3_579_545;
            near("ACPI timer against PIT", us, pm, 2);
        }
        None => report::skip("ACPI timer", "no FADT was found"),
    }
}

/// The port of the ACPI timer, by RSDP, RSDT or XSDT, and FADT.
fn acpi_timer() -> Option<u16> {
    let root =
        (0xe_0000..0x10_0000u64).step_by(16).find(|at| read64(*at) == u64::from_le_bytes(*b"RSD PTR "))?;
    let extended = read32(root + 12) >> 24 >= 2;
    let wide = |at: u64| u64::from(read32(at)) | u64::from(read32(at + 4)) << 32;
    let (table, size) = if extended { (wide(root + 24), 8) } else { (u64::from(read32(root + 16)), 4) };
    let len = u64::from(read32(table + 4));
    for slot in (table + 36..table + len).step_by(size as usize) {
        let at = if size == 8 { wide(slot) } else { u64::from(read32(slot)) };
        if read32(at) == u32::from_le_bytes(*b"FACP") {
            return u16::try_from(read32(at + 76)).ok().filter(|p| *p != 0);
        }
    }
    None
}

fn set_pit(mode: u8, count: u16) {
    out8(0x43, 0x30 | mode << 1);
    out8(0x40, count as u8);
    out8(0x40, (count >> 8) as u8);
}
fn latched() -> u16 {
    out8(0x43, 0);
    u16::from(in8(0x40)) | u16::from(in8(0x40)) << 8
}

fn pit() {
    apic::set_up_pics(1);
    // 1000 Hz, mode 2.
    set_pit(2, 1193);
    clear(PIC_TIMER);
    ticks("PIT mode 2: interrupts", for_ms(200), 1000, hits(PIC_TIMER));
    set_pit(3, 11932);
    clear(PIC_TIMER);
    ticks("PIT mode 3: interrupts", for_ms(500), 10_000, hits(PIC_TIMER));
    // One interrupt, then no more.
    set_pit(0, 5000);
    one(PIC_TIMER);
    clear(PIC_TIMER);
    set_pit(0, 5000);
    eq("PIT mode 0: one interrupt", 1, one(PIC_TIMER));
    // Masked at the PIC: held, and delivered when open.
    out8(0x21, 0xff);
    clear(PIC_TIMER);
    set_pit(0, 1000);
    for_ms(10);
    eq("PIC mask: nothing", 0, hits(PIC_TIMER));
    out8(0x20, 0xa);
    eq("PIC: requested", 1, in8(0x20) & 1);
    out8(0x21, 0xfe);
    eq("PIC open: delivered", 1, one(PIC_TIMER));
    out8(0x21, 0xff);
    // Counting, as read through the latch.
    set_pit(2, 0);
    let start = rdtsc();
    let first = latched();
    while since(start) < 20_000 {}
    let second = latched();
    let us = since(start);
    if us < 50_000 {
        near("PIT counts down", us * clock::PIT_HZ / 1_000_000, u64::from(first.wrapping_sub(second)), 5);
    } else {
        report::skip("PIT counts down", "the host was busy for too long");
    }
    // A latched value stays until it is read.
    out8(0x43, 0);
    clock::wait_ms(1);
    let held = u16::from(in8(0x40)) | u16::from(in8(0x40)) << 8;
    let next = latched();
    check("PIT latch holds", held.wrapping_sub(next) > 1000);
    // Read-back of the status: mode 2, both bytes, output high; of the count at once.
    set_pit(2, 0x8000);
    out8(0x43, 0xe2);
    eq("PIT status", 0x34, in8(0x40) & 0x3f);
    // Mode 3: the output is high for the first half of 54.9 ms.
    let status = || {
        out8(0x43, 0xe2);
        in8(0x40) & 0x80
    };
    set_pit(3, 0xffff);
    let start = rdtsc();
    eq("PIT mode 3: high first", 0x80, status());
    while status() != 0 {}
    let half = since(start);
    check("PIT mode 3: then low", half >= 26_500);
    // One byte alone.
    out8(0x43, 0x10);
    out8(0x40, 200);
    clock::wait_ms(1);
    eq("PIT mode 0: output high at the end", 0x80, status());
}

fn ioapic_write(register: u32, value: u32) {
    write32(IOAPIC, register);
    write32(IOAPIC + 0x10, value);
}
fn ioapic_read(register: u32) -> u32 {
    write32(IOAPIC, register);
    read32(IOAPIC + 0x10)
}

fn ioapic() {
    apic::mask_pics();
    check("IOAPIC: 24 pins", ioapic_read(1) >> 16 & 0xff == 23);
    let me = apic::id() << 24;
    // The PIT is wired to pin 2.
    ioapic_write(0x15, me);
    ioapic_write(0x14, PIN.into());
    set_pit(2, 1193);
    clear(PIN);
    ticks("IOAPIC: interrupts of the PIT", for_ms(100), 1000, hits(PIN));
    ioapic_write(0x14, 0x1_0000 | u32::from(PIN));
    for_ms(1);
    clear(PIN);
    for_ms(20);
    eq("IOAPIC: masked", 0, hits(PIN));
    eq("IOAPIC: entry reads back", 0x1_0000 | u32::from(PIN), ioapic_read(0x14));
    set_pit(0, 0);
}

fn rtc() {
    let bcd = |v: u8| u64::from(v >> 4) * 10 + u64::from(v & 15);
    let plain = cmos(0xb) & 4 != 0;
    let value = |register| {
        let v = cmos(register);
        if plain { v.into() } else { bcd(v) }
    };
    check("RTC: battery", cmos(0xd) & 0x80 != 0);
    let second = || loop {
        // Not while it is being updated.
        while cmos(0xa) & 0x80 != 0 {}
        let s = value(0);
        if s == value(0) {
            return s;
        }
    };
    check(
        "RTC: date",
        second() < 60 && value(2) < 60 && (1..=12).contains(&value(8)) && (1..=31).contains(&value(7)),
    );
    let first = second();
    while second() == first {}
    let (start, from) = (rdtsc(), second());
    while second() == from {}
    let us = since(start);
    // A busy host may let some seconds pass unseen.
    let passed = (second() + 60 - from) % 60;
    check("RTC: seconds", us + 50_000 >= passed * 1_000_000 && us <= passed * 1_000_000 + 500_000);
    // Periodic interrupts at 1024 Hz.
    apic::set_up_pics(0x104);
    cmos(0xc);
    set_cmos(0xa, 0x26);
    set_cmos(0xb, cmos(0xb) | 0x40);
    clear(PIC_RTC);
    ticks("RTC: periodic interrupts", for_ms(250), 976, hits(PIC_RTC));
    // Without reading register C there is no second one.
    set_cmos(0xb, cmos(0xb) & !0x70);
    cmos(0xc);
    apic::mask_pics();
    clock::wait_ms(20);
    check("RTC: flag without interrupt", cmos(0xc) & 0xc0 == 0x40);
    // The update interrupt, once a second.
    apic::set_up_pics(0x104);
    set_cmos(0xb, cmos(0xb) | 0x10);
    cmos(0xc);
    clear(PIC_RTC);
    ticks("RTC: update interrupts", for_ms(2500), 1_000_000, hits(PIC_RTC));
    set_cmos(0xb, cmos(0xb) & !0x70);
    cmos(0xc);
    apic::mask_pics();
}

fn hpet() {
    let period = read64(HPET) >> 32;
    if read64(HPET) & 0x8000 == 0 {
        report::skip("HPET interrupts", "no legacy replacement");
        return;
    }
    check("HPET: period", period > 0 && period <= 100_000_000);
    let count = |us: u64| us * 1_000_000_000 / period;
    apic::set_up_pics(1);
    // Timer 0, legacy route, periodic, every 2 ms.
    write64(HPET + 0x10, 0);
    write64(HPET + 0xf0, 0);
    write64(HPET + 0x100, 0x4 | 0x8 | 0x40);
    write64(HPET + 0x108, count(2000));
    write64(HPET + 0x108, count(2000));
    clear(PIC_TIMER);
    write64(HPET + 0x10, 3);
    ticks("HPET periodic: interrupts", for_ms(200), 2000, hits(PIC_TIMER));
    // One shot, 5 ms from now, when the period's last match is over as well. On a busy host that may come
    // late, but not after somebody has looked at the timer.
    write64(HPET + 0x100, 0x4);
    for_ms(3);
    read64(HPET + 0x100);
    for_ms(1);
    clear(PIC_TIMER);
    let start = rdtsc();
    write64(HPET + 0x108, read64(HPET + 0xf0) + count(5000));
    for_ms(3);
    not_yet("HPET one shot: not yet", since(start), 5000, hits(PIC_TIMER), 0);
    eq("HPET one shot: once", 1, one(PIC_TIMER));
    // Stopped, it stands.
    write64(HPET + 0x10, 0);
    let stands = read64(HPET + 0xf0);
    clock::wait_ms(2);
    eq("HPET: stands when off", stands, read64(HPET + 0xf0));
    write64(HPET + 0xf0, 0x1_2345_6789);
    eq("HPET: counter is set", 0x1_2345_6789, read64(HPET + 0xf0));
    write64(HPET + 0x100, 0);
    apic::mask_pics();
}

fn local() {
    // Its frequency by the TSC.
    apic::write(apic::TIMER_DIVIDE, 0xb);
    apic::write(apic::LVT_TIMER, 0x1_0000 | u32::from(LOCAL));
    // The middle one of three, as a busy host may come between two readings.
    let measure = || {
        let mut all = [0; 3].map(|_: u64| {
            apic::write(apic::TIMER_INITIAL, u32::MAX);
            let start = rdtsc();
            while since(start) < 10_000 {}
            let counted = u64::from(u32::MAX - apic::read(apic::TIMER_CURRENT));
            counted * 1000 / since(start)
        });
        all.sort_unstable();
        all[1]
    };
    let khz = measure();
    println!("local timer {} MHz", khz / 1000);
    let ms = |n: u64| (khz * n) as u32;
    // One shot.
    clear(LOCAL);
    apic::write(apic::LVT_TIMER, LOCAL.into());
    let start = rdtsc();
    apic::write(apic::TIMER_INITIAL, ms(10));
    for_ms(5);
    not_yet("local one shot: not yet", since(start), 10_000, hits(LOCAL), 0);
    eq("local one shot: once", 1, one(LOCAL));
    eq("local one shot: stands at 0", 0, apic::read(apic::TIMER_CURRENT));
    for_ms(20);
    eq("local one shot: no more", 1, hits(LOCAL));
    // Periodic.
    apic::write(apic::LVT_TIMER, 0x2_0000 | u32::from(LOCAL));
    apic::write(apic::TIMER_INITIAL, ms(2));
    clear(LOCAL);
    ticks("local periodic: interrupts", for_ms(200), 2000, hits(LOCAL));
    check("local periodic: counts", apic::read(apic::TIMER_CURRENT) <= ms(2));
    apic::write(apic::TIMER_INITIAL, 0);
    for_ms(1);
    clear(LOCAL);
    for_ms(10);
    eq("local: initial count 0 stops", 0, hits(LOCAL));
    // Masked.
    apic::write(apic::LVT_TIMER, 0x3_0000 | u32::from(LOCAL));
    apic::write(apic::TIMER_INITIAL, ms(1));
    for_ms(10);
    eq("local: masked", 0, hits(LOCAL));
    // All divisors: 2, 4, 8, 16, 32, 64, 128, 1.
    for (code, divisor) in [(0u32, 2u64), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)] {
        apic::write(apic::TIMER_DIVIDE, code);
        near("local: divisor", khz / divisor, measure(), 5);
    }
    apic::write(apic::TIMER_INITIAL, 0);
    // HLT is left by the timer.
    apic::write(apic::TIMER_DIVIDE, 0xb);
    apic::write(apic::LVT_TIMER, LOCAL.into());
    clear(LOCAL);
    let start = rdtsc();
    for _ in 0..20 {
        apic::write(apic::TIMER_INITIAL, ms(2));
        cpu::sti_hlt_cli();
    }
    let us = since(start);
    eq("hlt: woken each time", 20, hits(LOCAL));
    check("hlt: not too early", us >= 39_000);
}

fn deadline() {
    let tsc_hz = TSC_MHZ.get() * 1_000_000;
    if cpu::cpuid(1, 0)[2] & 1 << 24 == 0 {
        report::skip("TSC deadline", "the processor has none");
        return;
    }
    apic::write(apic::LVT_TIMER, 0x4_0000 | u32::from(LOCAL));
    clear(LOCAL);
    let start = rdtsc();
    cpu::wrmsr(msr::TSC_DEADLINE, start + tsc_hz / 100);
    eq("deadline: reads back", start + tsc_hz / 100, cpu::rdmsr(msr::TSC_DEADLINE));
    for_ms(5);
    not_yet("deadline: not yet", since(start), 10_000, hits(LOCAL), 0);
    eq("deadline: once", 1, one(LOCAL));
    eq("deadline: disarmed", 0, cpu::rdmsr(msr::TSC_DEADLINE));
    cpu::wrmsr(msr::TSC_DEADLINE, 1);
    for_ms(1);
    eq("deadline: in the past, at once", 2, hits(LOCAL));
    cpu::wrmsr(msr::TSC_DEADLINE, rdtsc() + tsc_hz / 200);
    cpu::wrmsr(msr::TSC_DEADLINE, 0);
    for_ms(10);
    eq("deadline: taken back", 2, hits(LOCAL));
    // No interrupt is before its deadline.
    let mut early = 0;
    for _ in 0..20 {
        let due = rdtsc() + tsc_hz / 1000;
        cpu::wrmsr(msr::TSC_DEADLINE, due);
        cpu::sti_hlt_cli();
        early += u32::from(rdtsc() < due);
    }
    eq("deadline: never early", 0, early);
    apic::write(apic::TIMER_INITIAL, u32::MAX);
    eq("deadline: initial count is ignored", 0, apic::read(apic::TIMER_CURRENT));
    moved_tsc(tsc_hz);
}

/// A deadline is a value of this processor's own TSC, wherever that is moved to.
fn moved_tsc(tsc_hz: u64) {
    if cpu::cpuid(7, 0)[1] & 1 << 1 == 0 {
        report::skip("deadline: moved TSC", "the processor has no IA32_TSC_ADJUST");
        return;
    }
    let (adjust, ten) = (cpu::rdmsr(msr::TSC_ADJUST), 10 * tsc_hz);
    for (what, write) in [
        (
            "deadline: TSC_ADJUST passes it",
            (|hz| cpu::wrmsr(msr::TSC_ADJUST, cpu::rdmsr(msr::TSC_ADJUST) + hz)) as fn(u64),
        ),
        ("deadline: a new TSC passes it", |hz| cpu::wrmsr(msr::TSC, rdtsc() + hz)),
    ] {
        clear(LOCAL);
        let due = rdtsc() + ten;
        cpu::wrmsr(msr::TSC_DEADLINE, due);
        write(ten);
        eq(what, 1, one(LOCAL));
    }
    // The TSC is 20 s ahead of what it was.
    clear(LOCAL);
    cpu::wrmsr(msr::TSC_DEADLINE, rdtsc() + tsc_hz / 200);
    cpu::sti_hlt_cli();
    eq("deadline: in a moved TSC", 1, hits(LOCAL));
    clear(LOCAL);
    cpu::wrmsr(msr::TSC_DEADLINE, rdtsc() + tsc_hz / 100);
    cpu::wrmsr(msr::TSC_ADJUST, adjust);
    eq("deadline: moved back, not at once", 0, {
        for_ms(20);
        hits(LOCAL)
    });
    cpu::wrmsr(msr::TSC_DEADLINE, 0);
}
