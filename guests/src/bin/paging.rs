//! Page tables: sizes, accessed and dirty bits, rights at every level, what drops a translation, code whose
//! page changes under it (Intel SDM vol. 3A, chapter 5).
#![no_std]
#![no_main]

use kit::boot::KIT_PML4;
use kit::cpu::{self, msr};
use kit::page::{self, A, ADDRESS, D, G, LARGE, NX, P, TEST, U, W, fresh, look, map};
use kit::trap::{DONE, catch, user};
use kit::{check, eq, report, snippet};

kit::guest!(main);

snippet!(load, load_at, "", "mov rax, [rdi]");
snippet!(store, store_at, "xor eax, eax", "mov [rdi], rax");
snippet!(call_it, call_it_at, "", "call rdi");
snippet!(to_cr3, to_cr3_at, "", "mov cr3, rdi");
snippet!(to_cr4, to_cr4_at, "", "mov cr4, rdi");
snippet!(to_cr0, to_cr0_at, "", "mov cr0, rdi");
snippet!(
    invpcid,
    invpcid_at,
    "lea rax, [rsp - 32]; mov [rax], rsi; mov [rax + 8], rdx",
    "invpcid rdi, [rax]"
);

fn read(at: u64) -> u64 {
    // SAFETY: the caller mapped it.
    unsafe { (at as *const u64).read_volatile() }
}
fn write(at: u64, value: u64) {
    // SAFETY: the caller mapped it.
    unsafe { (at as *mut u64).write_volatile(value) }
}
/// Fills the page `frame` with a function that returns `value`, at its start.
fn function(frame: u64, value: u32) {
    // mov eax, value; ret
    write(frame, 0xb8 | u64::from(value) << 8 | 0xc3 << 40);
}
fn call(at: u64) -> u64 {
    let f: extern "C" fn() -> u64 =
        // SAFETY: the caller put a function there.
        unsafe { core::mem::transmute(at) };
    f()
}
/// Vector and error code that `run` at `at` ends with, or DONE.
fn outcome(run: unsafe extern "C" fn(u64) -> u64, at: u64) -> u64 {
    catch(run, at).map_or(DONE, |t| t.frame.vector << 32 | t.frame.error)
}
fn user_outcome(run: unsafe extern "C" fn(u64) -> u64, at: u64) -> u64 {
    let t = user(run, at);
    if t.frame.vector == DONE { DONE } else { t.frame.vector << 32 | t.frame.error }
}
const fn fault(error: u64) -> u64 {
    14 << 32 | error
}

fn main() {
    report::tcg_fails(&[
        "large bit at the top level is reserved",
        "2 MiB page: address bit 13 is reserved",
        "1 GiB page: address bit 13 is reserved",
    ]);
    bits_4k();
    bits_large();
    dropping();
    rights();
    crossing();
    code();
    other_spaces();
    pcid();
    kept_spaces();
}

fn bits_4k() {
    let at = TEST;
    let frame = fresh();
    map(at, 1, frame | P | W);
    let marks = |level| look(at, level) & (A | D);
    for level in 2..=4 {
        let slot = page::entry(at, level);
        // SAFETY: a valid slot.
        unsafe { slot.write_volatile(slot.read_volatile() & !A) };
    }
    cpu::set_cr3(cpu::cr3());
    read(at);
    eq("4 KiB: read sets A", A, marks(1));
    eq("4 KiB: read sets A in the directory", A, marks(2) & A);
    eq("4 KiB: read sets A in the pointer table", A, marks(3) & A);
    eq("4 KiB: read sets A at the top", A, marks(4) & A);
    write(at, 1);
    eq("4 KiB: write after read sets D", A | D, marks(1));
    map(at, 1, frame | P | W);
    write(at, 2);
    eq("4 KiB: write sets A and D", A | D, marks(1));
    map(at, 1, frame | P | W);
    // SAFETY: adds to the page.
    unsafe { core::arch::asm!("lock add qword ptr [{}], 1", in(reg) at) };
    eq("4 KiB: locked add sets D", A | D, marks(1));
    eq("4 KiB: value", 3, read(frame));
    map(at, 1, frame | P);
    eq("4 KiB: write to read-only", fault(3), outcome(store, at));
    eq("4 KiB: and no D", 0, marks(1) & D);
    map(at, 1, frame | P | W);
    function(frame, 5);
    eq("4 KiB: call", 5, call(at));
    eq("4 KiB: call sets A", A, marks(1));
    map(at, 1, 0);
    eq("4 KiB: absent", fault(0), outcome(load, at));
    eq("4 KiB: absent entry is left alone", 0, look(at, 1));
    // An absent entry may become present without INVLPG.
    // SAFETY: a valid slot.
    unsafe { page::entry(at, 1).write_volatile(frame | P | W) };
    function(frame, 6);
    eq("4 KiB: absent to present needs no INVLPG", 6, call(at));
}

/// Where large pages show low memory.
const TWO: u64 = TEST + (2 << 30);
const ONE: u64 = TEST + (5 << 30);

fn bits_large() {
    let frame = fresh();
    write(frame, 0x1234);
    map(TWO, 2, P | W | LARGE);
    // The image lies in the first 2 or 4 MiB.
    map(TWO + (2 << 20), 2, 2 << 20 | P | W | LARGE);
    eq("2 MiB: read", 0x1234, read(TWO + frame));
    let at = TWO + (frame & !0x1f_ffff);
    eq("2 MiB: read sets A alone", A, look(at, 2) & (A | D));
    write(TWO + frame, 0x55);
    eq("2 MiB: write sets D", A | D, look(at, 2) & (A | D));
    eq("2 MiB: the frame has it", 0x55, read(frame));
    map(TWO + (4 << 20), 2, 1 << 13 | P | W | LARGE);
    eq("2 MiB page: address bit 13 is reserved", fault(9), outcome(load, TWO + (4 << 20)));
    if cpu::cpuid(0x8000_0001, 0)[3] & 1 << 26 == 0 {
        report::skip("1 GiB pages", "the processor has none");
    } else {
        map(ONE, 3, P | W | LARGE);
        eq("1 GiB: read", 0x55, read(ONE + frame));
        eq("1 GiB: read sets A alone", A, look(ONE, 3) & (A | D));
        write(ONE + frame, 0x66);
        eq("1 GiB: write sets D", A | D, look(ONE, 3) & (A | D));
        eq("1 GiB: seen by the 2 MiB page", 0x66, read(TWO + frame));
        function(frame, 77);
        eq("1 GiB: call", 77, call(ONE + frame));
        map(ONE + (1 << 30), 3, 1 << 13 | P | W | LARGE);
        eq("1 GiB page: address bit 13 is reserved", fault(9), outcome(load, ONE + (1 << 30)));
        map(ONE, 3, 0);
        eq("1 GiB: gone", fault(0), outcome(load, ONE + frame));
    }
    // The large bit at the top level is reserved.
    let slot = page::entry(TEST + (1 << 39), 4);
    // SAFETY: a valid slot.
    unsafe { slot.write_volatile(P | W | LARGE) };
    eq("large bit at the top level is reserved", fault(9), outcome(load, TEST + (1 << 39)));
    // SAFETY: as above.
    unsafe { slot.write_volatile(0) };
}

fn dropping() {
    let at = TEST + 0x1_0000;
    let (one, two) = (fresh(), fresh());
    write(one, 1);
    write(two, 2);
    let set = |value: u64| {
        // SAFETY: a valid slot.
        unsafe { page::entry(at, 1).write_volatile(value | P | W) }
    };
    set(one);
    eq("first frame", 1, read(at));
    set(two);
    cpu::invlpg(at + 0xfff);
    eq("INVLPG: second frame", 2, read(at));
    set(one);
    cpu::set_cr3(cpu::cr3());
    eq("CR3: first frame", 1, read(at));
    let cr4 = cpu::cr4();
    cpu::set_cr4(cr4 | 1 << 7);
    set(two | G);
    cpu::invlpg(at);
    eq("global: second frame", 2, read(at));
    set(one | G);
    cpu::invlpg(at);
    eq("INVLPG drops a global page", 1, read(at));
    set(two | G);
    cpu::set_cr4(cr4);
    eq("CR4.PGE off drops global pages", 2, read(at));
    set(one | G);
    cpu::set_cr4(cr4 | 1 << 7);
    eq("CR4.PGE on drops all", 1, read(at));
    set(two | G);
    cpu::invlpg(at);
    // Writes are dropped as well as reads.
    write(at, 22);
    set(one | G);
    cpu::invlpg(at);
    write(at, 11);
    eq("writes go where the entry says", 11, read(one));
    eq("and not elsewhere", 22, read(two));
    cpu::set_cr4(cr4);
    // INVLPG anywhere in a large page drops all of it.
    map(TWO, 2, P | W | LARGE);
    let low = 0x5_0000;
    write(low, 0xaa);
    write(low + (8 << 20), 0xbb);
    eq("2 MiB: before", 0xaa, read(TWO + low));
    // SAFETY: a valid slot.
    unsafe { page::entry(TWO, 2).write_volatile(8 << 20 | P | W | LARGE) };
    cpu::invlpg(TWO + 0x1f_f000);
    eq("2 MiB: after INVLPG elsewhere in it", 0xbb, read(TWO + low));
    map(TWO, 2, P | W | LARGE);
    // A table above the page changes.
    let table = fresh();
    write(table + ((at >> 12) & 511) * 8, two | P | W);
    let directory = page::entry(at, 2);
    // SAFETY: a valid slot.
    let old = unsafe { directory.read_volatile() };
    eq("before the table changes", 11, read(at));
    // SAFETY: as above.
    unsafe { directory.write_volatile(table | P | W | U) };
    cpu::invlpg(at);
    eq("INVLPG drops cached tables", 22, read(at));
    // SAFETY: as above.
    unsafe { directory.write_volatile(old) };
    cpu::set_cr3(cpu::cr3());
    eq("CR3 drops cached tables", 11, read(at));
}

fn rights() {
    let at = TEST + (9 << 30);
    let frame = fresh();
    function(frame, 9);
    map(at, 1, frame | P | W | U);
    let all = look(at, 2);
    let above = |value: u64| {
        // SAFETY: a valid slot.
        unsafe { page::entry(at, 2).write_volatile(value) };
        cpu::set_cr3(cpu::cr3());
    };
    eq("all rights: user reads", DONE, user_outcome(load, at));
    above(all & !U);
    eq("directory without U: user reads", fault(5), user_outcome(load, at));
    eq("directory without U: supervisor reads", DONE, outcome(load, at));
    above(all & !W);
    eq("directory without W: supervisor writes", fault(3), outcome(store, at + 64));
    eq("directory without W: user writes", fault(7), user_outcome(store, at + 64));
    above(all | NX);
    eq("directory with NX: fetch", fault(0x11), outcome(call_it, at));
    eq("directory with NX: read", DONE, outcome(load, at));
    above(all);
    eq("all rights: call", 9, call(at));
    map(at, 1, frame | P | W | U | NX);
    eq("NX after a call", fault(0x11), outcome(call_it, at));
    map(at, 1, frame | P | W | U);
    eq("call again", 9, call(at));
    write(at + 64, 1);
    map(at, 1, frame | P | U);
    eq("read-only after a write", fault(3), outcome(store, at + 64));
    map(at, 1, frame | P | W);
    eq("user: supervisor's after all", fault(5), user_outcome(load, at));
    let efer = cpu::rdmsr(msr::EFER);
    eq("EFER.NXE is on", 1 << 11, efer & 1 << 11);
}

fn crossing() {
    let at = TEST + (10 << 30);
    let (low, high) = (fresh(), fresh());
    // Linear neighbours whose frames are not, and stand the other way round.
    map(at, 1, high | P | W);
    map(at + 4096, 1, low | P | W);
    write(at + 4092, 0x8877_6655_4433_2211);
    eq("crossing: lower half", 0x4433_2211, read(high + 4088) >> 32);
    eq("crossing: upper half", 0x8877_6655, read(low) & 0xffff_ffff);
    eq("crossing: read", 0x8877_6655_4433_2211, read(at + 4092));
    for ahead in 1..8u64 {
        let value = 0x0102_0304_0506_0708u64.wrapping_mul(ahead);
        write(at + 4096 - ahead, value);
        if read(at + 4096 - ahead) != value {
            eq("crossing: every distance", value, read(at + 4096 - ahead));
        }
    }
    // SAFETY: the bytes around the border.
    unsafe {
        core::arch::asm!("lock xadd [{0}], {1}", in(reg) at + 4093, inout(reg) 1u64 => _);
        core::arch::asm!("movups xmm0, [{0}]", "movups [{0} + 64]  , xmm0", in(reg) at + 4040, out("xmm0") _);
        core::arch::asm!("movups xmm0, [{0}]", "movups [{1}], xmm0", in(reg) at + 4088, in(reg) at + 512, out("xmm0") _);
    }
    eq("crossing: 16 bytes, low", read(at + 4088), read(at + 512));
    eq("crossing: 16 bytes, high", read(at + 4096), read(at + 520));
    // A store over the border whose second page is absent leaves the first alone.
    map(at + 4096, 1, 0);
    let before = read(at + 4088);
    eq("crossing: second page absent", fault(2), outcome(store, at + 4092));
    eq("crossing: nothing was written", before, read(at + 4088));
    // The way into the top half of the address space.
    let top = 0xffff_ffff_ffff_f000;
    map(top, 1, high | P | W);
    write(top + 0xff8, 0x70b);
    eq("last page of all", 0x70b, read(high + 0xff8));
}

fn code() {
    let at = TEST + (11 << 30);
    let (one, two) = (fresh(), fresh());
    function(one, 111);
    function(two, 222);
    map(at, 1, one | P | W);
    eq("code: first frame", 111, call(at));
    map(at, 1, two | P | W);
    eq("code: second frame", 222, call(at));
    map(at, 1, one | P | W);
    eq("code: first frame again", 111, call(at));
    map(at + 4096, 1, one | P | W);
    eq("code: same frame elsewhere", 111, call(at + 4096));
    function(one, 333);
    eq("code: written by its own frame", 333, call(at));
    eq("code: seen at both places", 333, call(at + 4096));
    // lea rax, [rip]; ret: translated once, it must still know where it runs.
    write(one, 0xc3_0000_0000_058d48);
    eq("code: its own address", at + 7, call(at));
    eq("code: its own address elsewhere", at + 4096 + 7, call(at + 4096));
    // One instruction over two pages, of which the second changes.
    map(at, 1, one | P | W);
    map(at + 4096, 1, two | P | W);
    // SAFETY: mov eax, imm32 with its first two bytes at the end of the first page.
    let third = fresh();
    // SAFETY: the frames are the test's own.
    unsafe {
        let b = (one + 4094) as *mut u8;
        b.write_volatile(0xb8);
        b.add(1).write_volatile(0x11);
        for (frame, byte) in [(two, 0x22), (third, 0x33)] {
            let b = frame as *mut u8;
            for (i, value) in [byte, byte, byte, 0xc3].into_iter().enumerate() {
                b.add(i).write_volatile(value);
            }
        }
    }
    eq("code: over two pages", 0x2222_2211, call(at + 4094));
    map(at + 4096, 1, third | P | W);
    eq("code: over two pages, second changed", 0x3333_3311, call(at + 4094));
    // SAFETY: the frame is the test's own.
    unsafe { (third as *mut u8).write_volatile(0x44) };
    eq("code: over two pages, second written", 0x3333_4411, call(at + 4094));
    map(at + 4096, 1, third | P | W | NX);
    let t = catch(call_it, at + 4094).unwrap_or_default();
    eq("code: over two pages, second NX", fault(0x11), t.frame.vector << 32 | t.frame.error);
    eq("code: RIP is the instruction's", at + 4094, t.frame.rip);
    eq("code: CR2 is the page's", at + 4096, t.cr2);
    map(at + 4096, 1, 0);
    let t = catch(call_it, at + 4094).unwrap_or_default();
    eq("code: over two pages, second absent", fault(0x10), t.frame.vector << 32 | t.frame.error);
}

/// A second address space like the first, but for what lies at `at`.
fn second_space(at: u64, entry: u64) -> u64 {
    let pml4 = fresh();
    let copy = |from: u64, to: u64| {
        for i in 0..512 {
            write(to + i * 8, read(from + i * 8));
        }
    };
    copy(KIT_PML4.addr(), pml4);
    let mut table = pml4;
    for level in [4, 3, 2] {
        let slot = table + (at >> (3 + 9 * level) & 511) * 8;
        let below = fresh();
        copy(read(slot) & ADDRESS, below);
        write(slot, below | P | W | U);
        table = below;
    }
    write(table + (at >> 12 & 511) * 8, entry);
    pml4
}

fn other_spaces() {
    let at = TEST + (12 << 30);
    let (one, two) = (fresh(), fresh());
    function(one, 1);
    function(two, 2);
    map(at, 1, one | P | W);
    let first = cpu::cr3();
    let second = second_space(at, two | P | W);
    let mut sum = 0;
    for _ in 0..100 {
        sum += call(at);
        cpu::set_cr3(second);
        sum += call(at) << 16;
        write(at + 64, read(at + 64) + 1);
        cpu::set_cr3(first);
        write(at + 64, read(at + 64) + 3);
    }
    eq("two spaces: code", 100 | 200 << 16, sum);
    eq("two spaces: data of the second", 100, read(two + 64));
    eq("two spaces: data of the first", 300, read(one + 64));
    // A table that shows itself.
    let slot = page::entry(300 << 39 | !0 << 48, 4);
    // SAFETY: a valid slot.
    unsafe { slot.write_volatile(KIT_PML4.addr() | P | W) };
    let window = |linear: u64| 0xffff_0000_0000_0000 | 300 << 39 | (linear >> 9 & 0x7f_ffff_fff8);
    eq("self-map: entry", look(at, 1), read(window(at)));
    write(window(at), two | P | W);
    cpu::invlpg(at);
    eq("self-map: written", 2, call(at));
    // SAFETY: as above.
    unsafe { slot.write_volatile(0) };
    cpu::set_cr3(first);
}

fn pcid() {
    if cpu::cpuid(1, 0)[2] & 1 << 17 == 0 {
        report::skip("PCID", "the processor has none");
        return;
    }
    let at = TEST + (13 << 30);
    let (one, two) = (fresh(), fresh());
    write(one, 1);
    write(two, 2);
    map(at, 1, one | P | W);
    let first = cpu::cr3() & ADDRESS;
    let second = second_space(at, two | P | W);
    let gp = 13 << 32;
    let cr4 = cpu::cr4();
    eq("#GP CR3 bit 63 without PCIDE", gp, outcome(to_cr3, first | 1 << 63));
    cpu::set_cr3(first | 0x18);
    eq("#GP CR4.PCIDE with a PCID in CR3", gp, outcome(to_cr4, cr4 | 1 << 17));
    cpu::set_cr4(cr4);
    cpu::set_cr3(first);
    cpu::set_cr4(cr4 | 1 << 17);
    eq("#GP paging off with PCIDE", gp, outcome(to_cr0, cpu::cr0() & !(1 << 31)));
    let no_flush = 1 << 63;
    cpu::set_cr3(first | 1);
    eq("PCID 1", 1, read(at));
    cpu::set_cr3(second | 2);
    eq("PCID 2", 2, read(at));
    let mut good = true;
    for _ in 0..100 {
        cpu::set_cr3(first | 1 | no_flush);
        good &= read(at) == 1;
        cpu::set_cr3(second | 2 | no_flush);
        good &= read(at) == 2;
    }
    check("PCID: spaces stay apart without flushes", good);
    eq("PCID: CR3 bit 63 reads 0", second | 2, cpu::cr3());
    // What was changed while another PCID was in use is dropped by a load without bit 63.
    let three = fresh();
    write(three, 3);
    // SAFETY: a valid slot of the first space's table.
    unsafe { page::entry(at, 1).write_volatile(three | P | W) };
    cpu::set_cr3(first | 1);
    eq("PCID: load without bit 63 drops", 3, read(at));
    if cpu::cpuid(7, 0)[1] & 1 << 10 != 0 {
        let invalidate = |kind: u64, pcid: u64, address: u64| {
            // SAFETY: only drops translations.
            unsafe {
                let words = [pcid, address];
                core::arch::asm!("invpcid {}, [{}]", in(reg) kind, in(reg) words.as_ptr());
            }
        };
        for (what, kind, frame, value) in [
            ("INVPCID: one address", 0, one, 1),
            ("INVPCID: one PCID", 1, three, 3),
            ("INVPCID: all with globals", 2, one, 1),
            ("INVPCID: all but globals", 3, three, 3),
        ] {
            read(at);
            // SAFETY: as above.
            unsafe { page::entry(at, 1).write_volatile(frame | P | W) };
            invalidate(kind, 1, at);
            eq(what, value, read(at));
        }
        eq("#GP INVPCID of kind 4", gp, outcome(invpcid, 4));
    } else {
        report::skip("INVPCID", "the processor has none");
    }
    cpu::set_cr3(first);
    cpu::set_cr4(cr4);
}

/// What the user calls at `at` returns, or the vector of its trap above bit 32.
fn user_call(at: u64) -> u64 {
    let t = user(call_it, at);
    if t.frame.vector == DONE { t.frame.rax } else { t.frame.vector << 32 }
}

/// The user's translations and jumps of several address spaces at once: none may be kept longer than its PCID allows.
fn kept_spaces() {
    if cpu::cpuid(1, 0)[2] & 1 << 17 == 0 || cpu::cpuid(7, 0)[1] & 1 << 10 == 0 {
        report::skip("kept spaces", "the processor has no PCID or no INVPCID");
        return;
    }
    const RIGHTS: u64 = P | W | U;
    let (at, shared) = (TEST + (14 << 30), TEST + (15 << 30));
    let frames = [fresh(), fresh(), fresh()];
    for (n, frame) in frames.into_iter().enumerate() {
        function(frame, n as u32 + 1);
    }
    let [one, two, three] = frames;
    map(at, 1, one | RIGHTS);
    map(shared, 1, one | RIGHTS | G);
    let (first, cr4) = (cpu::cr3() & ADDRESS, cpu::cr4());
    let second = second_space(at, two | RIGHTS);
    let set = |linear: u64, entry: u64| {
        // SAFETY: a valid slot.
        unsafe { page::entry(linear, 1).write_volatile(entry | RIGHTS) }
    };
    let invalidate = |kind: u64, pcid: u64, address: u64| {
        let words = [pcid, address];
        // SAFETY: only drops translations.
        unsafe { core::arch::asm!("invpcid {}, [{}]", in(reg) kind, in(reg) words.as_ptr()) };
    };
    let keep = 1 << 63;
    cpu::set_cr4(cr4 | 1 << 17 | 1 << 7);
    cpu::set_cr3(first | 1);
    cpu::set_cr3(second | 2);
    let mut sum = 0;
    for _ in 0..50 {
        cpu::set_cr3(first | 1 | keep);
        sum += user_call(at);
        cpu::set_cr3(second | 2 | keep);
        sum += user_call(at) << 16;
    }
    eq("user's code in two spaces", 50 | 100 << 16, sum);
    // Many more spaces than anybody keeps.
    let mut good = true;
    for round in 0..3 {
        for pcid in 3..40 {
            let (root, value) = if pcid & 1 == 0 { (second, 2) } else { (first, 1) };
            cpu::set_cr3(root | pcid | if round == 0 { 0 } else { keep });
            good &= user_call(at) == value;
        }
    }
    check("user's code in 40 spaces", good);
    for (what, frame, kind, pcid) in [
        ("another PCID: one address", three, 0, 1),
        ("another PCID: all of it", one, 1, 1),
        ("another PCID: everything but globals", three, 3, 0),
        ("another PCID: everything", one, 2, 0),
    ] {
        cpu::set_cr3(first | 1 | keep);
        user_call(at);
        cpu::set_cr3(second | 2 | keep);
        user_call(at);
        set(at, frame);
        invalidate(kind, pcid, at);
        eq("  the other space's stays", 2, user_call(at));
        cpu::set_cr3(first | 1 | keep);
        eq(what, if frame == one { 1 } else { 3 }, user_call(at));
    }
    cpu::set_cr3(second | 2 | keep);
    set(at, three);
    cpu::set_cr3(first | 1);
    eq("load without bit 63 drops the user's", 3, user_call(at));
    // A global page is everybody's, and so is its end.
    eq("global: before", 1, user_call(shared));
    cpu::set_cr3(second | 2 | keep);
    user_call(shared);
    set(shared, two | G);
    cpu::invlpg(shared);
    eq("global: INVLPG", 2, user_call(shared));
    cpu::set_cr3(first | 1 | keep);
    eq("global: INVLPG in another space", 2, user_call(shared));
    set(shared, three | G);
    invalidate(2, 0, 0);
    cpu::set_cr3(second | 2 | keep);
    eq("global: INVPCID in another space", 3, user_call(shared));
    // Any address drops a large page whole.
    let (large, inside) = (TEST + (16 << 30), 0x1f_ffff);
    cpu::set_cr3(first | 1 | keep);
    map(large, 2, one & !inside | RIGHTS | LARGE);
    eq("large: one page", 1, user_call(large + (one & inside)));
    // SAFETY: a valid slot.
    unsafe { page::entry(large, 2).write_volatile(0) };
    cpu::invlpg(large + ((one & inside) ^ 0x10_0000));
    eq("large: INVLPG elsewhere in it", 14 << 32, user_call(large + (one & inside)));
    cpu::set_cr3(first);
    cpu::set_cr4(cr4);
    // PCIDs mean nothing now; used again, they start anew.
    set(at, two);
    cpu::set_cr3(first);
    cpu::set_cr4(cr4 | 1 << 17);
    cpu::set_cr3(first | 1 | keep);
    eq("PCIDE off and on drops all", 2, user_call(at));
    cpu::set_cr3(first);
    cpu::set_cr4(cr4);
}
