//! String instructions with REP: sizes, directions, over pages whose frames are no neighbours, faults in the
//! middle with the exact registers, going on after the fault (Intel SDM vol. 1, 7.3.9; vol. 2, REP).
#![no_std]
#![no_main]

use kit::page::{self, P, TEST, W};
use kit::trap::{self, Frame, Trap};
use kit::{Global, check, cpu, eq, snippet};

kit::guest!(main);

/// Registers before and after.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Regs {
    rax: u64,
    rcx: u64,
    rsi: u64,
    rdi: u64,
    flags: u64,
}

const DF: u64 = 0x400;
const ZF: u64 = 0x40;
const CF: u64 = 1;

macro_rules! string {
    ($($name:ident, $at:ident, $it:literal;)*) => {
        $(snippet!($name, $at,
            "mov r8, rdi; mov rax, [r8]; mov rcx, [r8 + 8]; mov rsi, [r8 + 16]; mov rdi, [r8 + 24]; push [r8 + 32]; popfq",
            $it,
            "pushfq; pop [r8 + 32]; cld; mov [r8], rax; mov [r8 + 8], rcx; mov [r8 + 16], rsi; mov [r8 + 24], rdi");)*
    };
}
string! {
    movsb, movsb_at, "rep movsb";
    movsw, movsw_at, "rep movsw";
    movsd, movsd_at, "rep movsd";
    movsq, movsq_at, "rep movsq";
    stosb, stosb_at, "rep stosb";
    stosw, stosw_at, "rep stosw";
    stosd, stosd_at, "rep stosd";
    stosq, stosq_at, "rep stosq";
    lodsb, lodsb_at, "rep lodsb";
    lodsq, lodsq_at, "rep lodsq";
    scasb_ne, scasb_ne_at, "repne scasb";
    scasb_e, scasb_e_at, "repe scasb";
    scasq_ne, scasq_ne_at, "repne scasq";
    cmpsb_e, cmpsb_e_at, "repe cmpsb";
    cmpsw_e, cmpsw_e_at, "repe cmpsw";
    cmpsq_e, cmpsq_e_at, "repe cmpsq";
    cmpsd_ne, cmpsd_ne_at, "repne cmpsd";
    one_movsq, one_movsq_at, "movsq";
    one_stosw, one_stosw_at, "stosw";
    one_lodsd, one_lodsd_at, "lodsd";
    one_scasw, one_scasw_at, "scasw";
    one_cmpsd, one_cmpsd_at, "cmpsd";
    // With 32-bit addresses: ECX counts, ESI and EDI are the pointers.
    movsb32, movsb32_at, ".byte 0x67; rep movsb";
    stosq32, stosq32_at, ".byte 0x67; rep stosq";
    // The override is for the source alone.
    movsb_fs, movsb_fs_at, ".byte 0x64; rep movsb";
    // A REX prefix that is not last does not count; repne on movs and stos means rep.
    stosd_rex, stosd_rex_at, ".byte 0x48, 0xf3, 0xab";
    movsb_ne, movsb_ne_at, ".byte 0xf2, 0xa4";
}

type Snippet = unsafe extern "C" fn(u64) -> u64;

fn run(f: Snippet, mut r: Regs) -> Regs {
    r.flags |= 2;
    // SAFETY: the test gives it memory that it may use.
    unsafe { f(&raw mut r as u64) };
    r
}

fn caught(f: Snippet, mut r: Regs) -> Option<Trap> {
    r.flags |= 2;
    trap::catch(f, &raw mut r as u64)
}

/// Four linear pages; the frames behind them are in another order, the fifth is absent.
const AREA: u64 = TEST + 0x10_0000;
const SIZE: u64 = 4 * 4096;
/// Another area, likewise.
const OTHER: u64 = TEST + 0x20_0000;

fn area(at: u64) {
    let frames = [0; 4].map(|_| page::fresh());
    for (i, order) in [2usize, 0, 3, 1].into_iter().enumerate() {
        page::map(at + i as u64 * 4096, 1, frames[order] | P | W);
    }
}
fn byte(at: u64) -> u8 {
    // SAFETY: mapped by `area`.
    unsafe { (at as *const u8).read_volatile() }
}
fn put(at: u64, value: u8) {
    // SAFETY: mapped by `area`.
    unsafe { (at as *mut u8).write_volatile(value) }
}
/// Fills an area with a pattern that no shift of it equals.
fn pattern(at: u64) {
    for i in 0..SIZE {
        put(at + i, (i * 7 + i / 251) as u8);
    }
}
fn same(a: u64, b: u64, len: u64) -> bool {
    (0..len).all(|i| byte(a + i) == byte(b + i))
}

fn main() {
    kit::report::tcg_fails(&["a REX prefix before REP does not count"]);
    area(AREA);
    area(OTHER);
    moves();
    stores_and_loads();
    scans();
    compares();
    single();
    addresses();
    faults();
    ports();
}

fn moves() {
    for (name, f, size) in
        [("movsb", movsb as Snippet, 1), ("movsw", movsw, 2), ("movsd", movsd, 4), ("movsq", movsq, 8)]
    {
        for backwards in [false, true] {
            // Odd ends, so that elements cross the page borders.
            for (from, to) in [(3u64, 5u64), (0, 0), (4093, 1), (1, 4090)] {
                pattern(AREA);
                for i in 0..SIZE {
                    put(OTHER + i, 0xee);
                }
                let count = (SIZE - 4200) / size;
                let len = count * size;
                let start = |base: u64| if backwards { base + len - size } else { base };
                let r = Regs {
                    rcx: count,
                    rsi: start(AREA + from),
                    rdi: start(OTHER + to),
                    flags: if backwards { DF } else { 0 },
                    ..Regs::default()
                };
                let after = run(f, r);
                let step = |at: u64| if backwards { at.wrapping_sub(len) } else { at + len };
                let good = same(AREA + from, OTHER + to, len)
                    && (0..to).all(|i| byte(OTHER + i) == 0xee)
                    && (to + len..SIZE).all(|i| byte(OTHER + i) == 0xee)
                    && after.rcx == 0
                    && after.rsi == step(r.rsi)
                    && after.rdi == step(r.rdi)
                    && after.flags & DF == r.flags & DF;
                check(name, good);
            }
        }
    }
    // Overlap: each element is moved before the next one is read.
    put(AREA, 0x5a);
    run(movsb, Regs { rcx: 9000, rsi: AREA, rdi: AREA + 1, ..Regs::default() });
    check("movsb over itself spreads the first byte", (0..=9000).all(|i| byte(AREA + i) == 0x5a));
    pattern(AREA);
    let word = [byte(AREA), byte(AREA + 1), byte(AREA + 2)];
    run(movsb, Regs { rcx: 6000, rsi: AREA, rdi: AREA + 3, ..Regs::default() });
    check("movsb over itself spreads three", (0..6000).all(|i| byte(AREA + i) == word[i as usize % 3]));
    pattern(AREA);
    pattern(OTHER);
    run(movsb, Regs { rcx: 5000, rsi: AREA + 2, rdi: AREA, ..Regs::default() });
    check("movsb down", same(AREA, OTHER + 2, 5000));
    pattern(AREA);
    run(movsq, Regs { rcx: 500, rsi: AREA + 4096 - 8, rdi: AREA + 4100 - 8, flags: DF, ..Regs::default() });
    check("movsq up, backwards, overlapping by half", same(AREA + 4100 - 4000, OTHER + 4096 - 4000, 4000));
    pattern(AREA);
    run(movsb_ne, Regs { rcx: 5000, rsi: OTHER, rdi: AREA + 100, ..Regs::default() });
    check("repne movsb is rep movsb", same(AREA + 100, OTHER, 5000));
}

fn stores_and_loads() {
    let value = 0x8877_6655_4433_2211u64;
    for (name, f, size) in
        [("stosb", stosb as Snippet, 1), ("stosw", stosw, 2), ("stosd", stosd, 4), ("stosq", stosq, 8)]
    {
        for backwards in [false, true] {
            pattern(AREA);
            let count = 9000 / size;
            let len = count * size;
            let start = if backwards { AREA + 5 + len - size } else { AREA + 5 };
            let flags = if backwards { DF } else { 0 };
            let after = run(f, Regs { rax: value, rcx: count, rdi: start, flags, ..Regs::default() });
            let good = (0..len).all(|i| byte(AREA + 5 + i) == value.to_le_bytes()[(i % size) as usize])
                && byte(AREA + 4) == byte(OTHER + 4)
                && after.rcx == 0
                && after.rax == value
                && after.rdi == if backwards { start.wrapping_sub(len) } else { start + len };
            check(name, good);
        }
    }
    pattern(AREA);
    run(stosd_rex, Regs { rax: value, rcx: 2, rdi: AREA, ..Regs::default() });
    check(
        "a REX prefix before REP does not count",
        byte(AREA + 7) == 0x44 && byte(AREA + 8) == byte(OTHER + 8),
    );
    pattern(AREA);
    let after = run(lodsb, Regs { rax: value, rcx: 5000, rsi: AREA + 1, ..Regs::default() });
    eq("lodsb keeps the last", value & !0xff | u64::from(byte(AREA + 5000)), after.rax);
    eq("lodsb rsi", AREA + 5001, after.rsi);
    let after = run(lodsq, Regs { rcx: 600, rsi: AREA + 4900, flags: DF, ..Regs::default() });
    eq("lodsq backwards", AREA + 100, after.rsi);
}

fn scans() {
    for i in 0..SIZE {
        put(AREA + i, 1);
    }
    put(AREA + 9001, 7);
    let r = Regs { rax: 7, rcx: 15000, rdi: AREA + 1, ..Regs::default() };
    let after = run(scasb_ne, r);
    eq("repne scasb: rdi", AREA + 9002, after.rdi);
    eq("repne scasb: rcx", 15000 - 9001, after.rcx);
    eq("repne scasb: ZF", ZF, after.flags & ZF);
    let after = run(scasb_ne, Regs { rcx: 9000, ..r });
    eq("repne scasb, not found: rcx", 0, after.rcx);
    eq("repne scasb, not found: ZF", 0, after.flags & ZF);
    let after = run(scasb_e, Regs { rax: 1, rcx: 15000, rdi: AREA, ..r });
    eq("repe scasb: rdi", AREA + 9002, after.rdi);
    eq("repe scasb: flags of 1 - 7", CF, after.flags & (CF | ZF));
    let after = run(scasb_e, Regs { rax: 1, rcx: 9000, rdi: AREA + 12000, flags: DF, ..r });
    eq("repe scasb backwards", AREA + 9000, after.rdi);
    let after = run(scasq_ne, Regs { rax: 0x0101_0101_0101_0701, rcx: 2000, rdi: AREA, ..r });
    eq("repne scasq", AREA + 9008, after.rdi);
    let flags = ZF | CF | 0x800;
    let after = run(scasb_ne, Regs { rcx: 0, flags, ..r });
    eq("rcx 0: flags stay", flags, after.flags & flags);
    eq("rcx 0: rdi stays", r.rdi, after.rdi);
}

fn compares() {
    pattern(AREA);
    pattern(OTHER);
    let r = Regs { rcx: 16000, rsi: AREA, rdi: OTHER, ..Regs::default() };
    let after = run(cmpsb_e, r);
    eq("repe cmpsb equal: rcx", 0, after.rcx);
    eq("repe cmpsb equal: ZF", ZF, after.flags & ZF);
    put(OTHER + 10001, byte(AREA + 10001).wrapping_add(1));
    let after = run(cmpsb_e, r);
    eq("repe cmpsb: rsi", AREA + 10002, after.rsi);
    eq("repe cmpsb: rdi", OTHER + 10002, after.rdi);
    eq("repe cmpsb: rcx", 16000 - 10002, after.rcx);
    eq("repe cmpsb: ZF", 0, after.flags & ZF);
    let after = run(cmpsw_e, Regs { rcx: 8000, ..r });
    eq("repe cmpsw", AREA + 10002, after.rsi);
    let after = run(cmpsq_e, Regs { rcx: 2000, rsi: AREA + 3, rdi: OTHER + 3, ..r });
    eq("repe cmpsq", AREA + 10003, after.rsi);
    let after = run(cmpsq_e, Regs { rcx: 1000, rsi: AREA + 12003, rdi: OTHER + 12003, flags: DF, ..r });
    eq("repe cmpsq backwards", AREA + 9987, after.rsi);
    for i in 0..SIZE {
        put(AREA + i, 1);
        put(OTHER + i, 2);
    }
    put(OTHER + 8000, 1);
    put(OTHER + 8001, 1);
    put(OTHER + 8002, 1);
    put(OTHER + 8003, 1);
    let after = run(cmpsd_ne, Regs { rcx: 4000, ..r });
    eq("repne cmpsd: rsi", AREA + 8004, after.rsi);
    eq("repne cmpsd: ZF", ZF, after.flags & ZF);
}

fn single() {
    pattern(AREA);
    pattern(OTHER);
    let at = 4093;
    let after = run(one_movsq, Regs { rcx: 5, rsi: OTHER + at, rdi: AREA + at + 8, ..Regs::default() });
    check("movsq over a border", same(AREA + at + 8, OTHER + at, 8));
    eq("movsq: rcx stays", 5, after.rcx);
    eq("movsq: rdi", AREA + at + 16, after.rdi);
    let after = run(one_stosw, Regs { rax: 0xbeef, rdi: AREA + 4095, flags: DF, ..Regs::default() });
    eq("stosw over a border", 0xbeef, u64::from(byte(AREA + 4095)) | u64::from(byte(AREA + 4096)) << 8);
    eq("stosw backwards", AREA + 4093, after.rdi);
    let after = run(one_lodsd, Regs { rax: !0, rsi: AREA + 4095, ..Regs::default() });
    eq("lodsd clears the upper half", 0xbeef, after.rax & 0xffff_ffff_0000_ffff);
    let after = run(one_scasw, Regs { rax: 0xbeef, rdi: AREA + 4095, ..Regs::default() });
    eq("scasw", ZF, after.flags & ZF);
    put(AREA, 5);
    put(OTHER, 6);
    let after = run(one_cmpsd, Regs { rsi: AREA, rdi: OTHER, ..Regs::default() });
    eq("cmpsd is source minus destination", CF, after.flags & (CF | ZF));
}

static LOW: Global<[u8; 64]> = Global::new([0; 64]);

fn addresses() {
    let at = LOW.addr();
    LOW.set([9; 64]);
    // Upper halves of the registers do not count, and are gone afterwards.
    let high = 0xdead_0000_0000_0000;
    let after = run(movsb32, Regs { rcx: high | 4, rsi: high | at, rdi: high | (at + 8), ..Regs::default() });
    eq("32-bit addresses: rcx", 0, after.rcx);
    eq("32-bit addresses: rsi", at + 4, after.rsi);
    eq("32-bit addresses: rdi", at + 12, after.rdi);
    let after = run(stosq32, Regs { rax: 3, rcx: high | 2, rdi: high | at, ..Regs::default() });
    eq("32-bit stosq", at + 16, after.rdi);
    eq("32-bit stosq wrote", 3, LOW.get()[8].into());
    cpu::wrmsr(cpu::msr::FS_BASE, at);
    LOW.set(core::array::from_fn(|i| i as u8));
    run(movsb_fs, Regs { rcx: 4, rsi: 16, rdi: at, ..Regs::default() });
    check("fs override for the source", LOW.get()[..4] == [16, 17, 18, 19]);
    cpu::wrmsr(cpu::msr::FS_BASE, 0);
}

/// Checks a page fault in the middle.
fn middle(what: &str, t: Option<Trap>, at: &[u64; 2], cr2: u64, error: u64, rcx: u64, rsi: u64, rdi: u64) {
    let t = t.unwrap_or_default();
    let f = &t.frame;
    if (f.vector, f.error, f.rip, t.cr2, f.rcx, f.rsi, f.rdi) == (14, error, at[0], cr2, rcx, rsi, rdi) {
        kit::report::pass(what);
    } else {
        kit::report::fail(
            what,
            format_args!(
                "expected cr2 {cr2:#x} error {error} rcx {rcx} rsi {rsi:#x} rdi {rdi:#x}, got vector {} cr2 {:#x} error \
                 {} rip {:#x} rcx {} rsi {:#x} rdi {:#x}",
                f.vector, t.cr2, f.error, f.rip, f.rcx, f.rsi, f.rdi
            ),
        );
    }
}

fn faults() {
    pattern(OTHER);
    let end = AREA + SIZE;
    let r = Regs { rcx: 1000, rsi: OTHER + 7, rdi: end - 300, ..Regs::default() };
    middle("movsb: store faults", caught(movsb, r), &movsb_at, end, 2, 700, OTHER + 307, end);
    check("movsb: what was before the fault is there", same(end - 300, OTHER + 7, 300));
    let from = OTHER + SIZE;
    let r = Regs { rcx: 1000, rsi: from - 300, rdi: AREA + 1, ..Regs::default() };
    middle("movsb: load faults", caught(movsb, r), &movsb_at, from, 0, 700, from, AREA + 301);
    // The element that crosses does not count.
    let r = Regs { rcx: 100, rsi: OTHER, rdi: end - 35, ..Regs::default() };
    middle("movsq: store faults", caught(movsq, r), &movsq_at, end, 2, 96, OTHER + 32, end - 3);
    let r = Regs { rcx: 100, rsi: from - 35, rdi: AREA, ..Regs::default() };
    middle("movsq: load faults", caught(movsq, r), &movsq_at, from, 0, 96, from - 3, AREA + 32);
    let r = Regs { rcx: 100, rsi: OTHER + 4000, rdi: AREA + 30, flags: DF, ..Regs::default() };
    middle(
        "movsd backwards: store faults",
        caught(movsd, r),
        &movsd_at,
        AREA - 2,
        2,
        92,
        OTHER + 3968,
        AREA - 2,
    );
    let r = Regs { rax: 1, rcx: 9000, rdi: end - 5000, ..Regs::default() };
    middle("stosb: store faults", caught(stosb, r), &stosb_at, end, 2, 4000, 0, end);
    let r = Regs { rax: 1, rcx: 900, rdi: end - 12, ..Regs::default() };
    middle("stosq: store faults", caught(stosq, r), &stosq_at, end, 2, 899, 0, end - 4);
    for i in 0..100 {
        put(end - 100 + i, 1);
        put(from - 100 + i, 1);
    }
    let r = Regs { rax: 7, rcx: 900, rdi: end - 100, ..Regs::default() };
    middle("scasb: load faults", caught(scasb_ne, r), &scasb_ne_at, end, 0, 800, 0, end);
    let r = Regs { rcx: 900, rsi: from - 60, rdi: end - 100, ..Regs::default() };
    middle("cmpsb: first load faults", caught(cmpsb_e, r), &cmpsb_e_at, from, 0, 840, from, end - 40);
    let r = Regs { rcx: 900, rsi: from - 100, rdi: end - 60, ..Regs::default() };
    middle("cmpsb: second load faults", caught(cmpsb_e, r), &cmpsb_e_at, end, 0, 840, from - 40, end);
    let r = Regs { rcx: 900, rsi: from - 60, ..Regs::default() };
    middle("lodsb: load faults", caught(lodsb, r), &lodsb_at, from, 0, 840, from, 0);
    // At once, with nothing done.
    let r = Regs { rcx: 5, rsi: OTHER, rdi: end, ..Regs::default() };
    middle("movsb: first store faults", caught(movsb, r), &movsb_at, end, 2, 5, OTHER, end);
    // No count, no access.
    check("rcx 0: no fault", caught(movsb, Regs { rsi: from, rdi: end, ..Regs::default() }).is_none());
    check(
        "rcx 0: no fault on cmps",
        caught(cmpsb_e, Regs { rsi: from, rdi: end, ..Regs::default() }).is_none(),
    );
    let r = Regs { rcx: 1 << 32, rsi: from, rdi: end, ..Regs::default() };
    check("ecx 0: no fault with 32-bit addresses", caught(movsb32, r).is_none());
    // A read-only destination.
    let frame = page::look(AREA + 4096, 1) & page::ADDRESS;
    page::map(AREA + 4096, 1, frame | P);
    let r = Regs { rcx: 5000, rsi: OTHER, rdi: AREA + 100, ..Regs::default() };
    middle(
        "movsb: read-only",
        caught(movsb, r),
        &movsb_at,
        AREA + 4096,
        3,
        5000 - 3996,
        OTHER + 3996,
        AREA + 4096,
    );
    page::map(AREA + 4096, 1, frame | P | W);
    // A handler maps the page and the instruction goes on.
    static FRAME: Global<u64> = Global::new(0);
    static FAULTS: Global<u64> = Global::new(0);
    FRAME.set(page::fresh());
    trap::handle(
        14,
        Some(|_: &mut Frame| {
            FAULTS.set(FAULTS.get() + 1);
            page::map(cpu::cr2() & !4095, 1, FRAME.get() | P | W);
        }),
    );
    pattern(OTHER);
    let after = run(movsb, Regs { rcx: 8000, rsi: OTHER + 9, rdi: end - 5000, ..Regs::default() });
    trap::handle(14, None);
    eq("goes on: faults", 1, FAULTS.get());
    eq("goes on: rcx", 0, after.rcx);
    check("goes on: all is there", same(end - 5000, OTHER + 9, 8000));
    page::map(end, 1, 0);
}

fn ports() {
    let text = b"rep outsb writes this line\n";
    let (mut from, mut count) = (text.as_ptr() as u64, text.len() as u64);
    // SAFETY: the debug console takes bytes.
    unsafe {
        core::arch::asm!("rep outsb", inout("rsi") from, inout("rcx") count, in("dx") kit::io::DEBUG_CONSOLE);
    }
    eq("rep outsb: rsi", text.as_ptr() as u64 + text.len() as u64, from);
    eq("rep outsb: rcx", 0, count);
    // The debug console reads as its own number. Over a page border.
    let mut to = AREA + 4096 - 5;
    count = 10;
    // SAFETY: mapped by `area`.
    unsafe {
        core::arch::asm!("rep insb", inout("rdi") to, inout("rcx") count, in("dx") kit::io::DEBUG_CONSOLE)
    };
    eq("rep insb: rcx", 0, count);
    eq("rep insb: rdi", AREA + 4096 + 5, to);
    check("rep insb: bytes", (0..10).all(|i| byte(AREA + 4091 + i) == 0xe9));
    let r = Regs { rcx: 10, rdi: AREA + SIZE - 4, ..Regs::default() };
    middle("insb: store faults", caught(insb, r), &insb_at, AREA + SIZE, 2, 6, 0, AREA + SIZE);
    let from = OTHER + SIZE;
    let r = Regs { rcx: 10, rsi: from - 4, ..Regs::default() };
    for i in 1..=4 {
        put(from - i, b'.');
    }
    middle("outsb: load faults", caught(outsb, r), &outsb_at, from, 0, 6, from, 0);
}
string! {
    insb, insb_at, "mov dx, 0xe9; 99: rep insb";
    outsb, outsb_at, "mov dx, 0xe9; 99: rep outsb";
}
