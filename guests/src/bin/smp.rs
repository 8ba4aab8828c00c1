//! Several processors: start-up, interrupts between them, locked and unlocked access to the same memory,
//! code and translations changed by another one, one clock. `cpus=N` on the command line says how many
//! there should be.
#![no_std]
#![no_main]

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst, fence};

use kit::cpu::{self, msr};
use kit::page::{self, P, W};
use kit::trap::{self, Frame};
use kit::{Global, apic, boot, check, clock, eq, println, report, smp};

kit::guest!(main);

const MAX: usize = smp::MAX;
const ROUNDS: u64 = 20_000;
/// Likewise, of what stops the world.
const PAGE_ROUNDS: u64 = 2_000;

const IPI: u8 = 0x90;
const SHOOT: u8 = 0x91;

/// What all shall do next: the number of the step; each answers in `DONE`.
static STEP: AtomicU32 = AtomicU32::new(0);
static DONE: AtomicU32 = AtomicU32::new(0);

static IDS: [AtomicU32; MAX] = [const { AtomicU32::new(u32::MAX) }; MAX];
static SEEN: [AtomicU32; MAX] = [const { AtomicU32::new(0) }; MAX];
static NMIS: AtomicU32 = AtomicU32::new(0);
static SLEEPING: AtomicU32 = AtomicU32::new(0);

static COUNTER: AtomicU64 = AtomicU64::new(0);
static SUMS: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];
static BITS: AtomicU64 = AtomicU64::new(0);
static LOCK: AtomicBool = AtomicBool::new(false);
static PLAIN: Global<u64> = Global::new(0);
#[repr(align(16))]
struct Pair([u64; 2]);
static PAIR: Global<Pair> = Global::new(Pair([0; 2]));

static X: AtomicU32 = AtomicU32::new(0);
static Y: AtomicU32 = AtomicU32::new(0);
static ROUND: AtomicU32 = AtomicU32::new(0);
static BACK: AtomicU32 = AtomicU32::new(0);
static ANSWER: AtomicU32 = AtomicU32::new(0);
static BAD: AtomicU32 = AtomicU32::new(0);
static STOP: AtomicBool = AtomicBool::new(false);
static CODE: AtomicU64 = AtomicU64::new(0);
static CLOCK: AtomicU64 = AtomicU64::new(0);

/// The steps. Those above `PAIRS` are for processor 1 alone, with processor 0 at the other end.
const INTERRUPTS: u32 = 1;
const LOCKED: u32 = 2;
const STORE_BUFFER: u32 = 3;
const MESSAGES: u32 = 4;
const CROSS_CODE: u32 = 5;
const SHOOTDOWN: u32 = 6;
const ONE_CLOCK: u32 = 7;
const TEXT_POKE: u32 = 8;

fn number() -> usize {
    let id = apic::id();
    IDS.iter().position(|i| i.load(SeqCst) == id).unwrap_or(0)
}

fn worker(me: u32) {
    let me = me as usize;
    IDS[me].store(apic::id(), SeqCst);
    let mut last = 0;
    loop {
        let step = STEP.load(SeqCst);
        if step == last {
            core::hint::spin_loop();
            continue;
        }
        last = step;
        if step <= LOCKED || me == 1 {
            other(step, me);
        }
        DONE.fetch_add(1, SeqCst);
    }
}

/// Has every other processor take `step` while this one does `mine`, and waits for all.
fn together(step: u32, others: u32, mine: impl FnOnce()) {
    DONE.store(0, SeqCst);
    STEP.store(step, SeqCst);
    mine();
    while DONE.load(SeqCst) < others {
        core::hint::spin_loop();
    }
}

fn main() {
    // TCG now and then misses a store that comes while the other processor translates.
    report::tcg_fails(&["code from another processor is seen"]);
    IDS[0].store(apic::id(), SeqCst);
    apic::enable();
    trap::handle(IPI, Some(count));
    trap::handle(SHOOT, Some(shoot));
    trap::handle(
        2,
        Some(|_| {
            NMIS.fetch_add(1, SeqCst);
        }),
    );
    let online = smp::start(worker, 50);
    println!("{online} processors");
    if let Some(wanted) = boot::command_line()
        .split(' ')
        .filter_map(|w| w.strip_prefix("cpus="))
        .find_map(|n| n.parse::<u32>().ok())
    {
        eq("number of processors", wanted, online);
    }
    let others = online - 1;
    let ids: u64 = (0..online as usize).fold(0, |all, i| all | 1 << (IDS[i].load(SeqCst) & 63));
    eq("APIC numbers are different", online, ids.count_ones());
    check("first processor says so", cpu::rdmsr(msr::APIC_BASE) & 1 << 8 != 0);
    own_interrupts();
    interrupts(others);
    together(LOCKED, others, locked);
    let all = u64::from(online);
    eq("lock inc", all * ROUNDS, COUNTER.load(SeqCst));
    eq("lock xadd", all * ROUNDS * 3, SUMS[0].load(SeqCst));
    eq("lock cmpxchg", all * ROUNDS, SUMS[1].load(SeqCst));
    eq("lock add of bytes", all * ROUNDS & 0xff, SUMS[2].load(SeqCst));
    eq("lock add over two cache lines", all * ROUNDS, split().0);
    let over = all * PAGE_ROUNDS;
    eq("lock add, xadd, cmpxchg over two pages", 3 * over | over << 32, over_pages().0);
    eq("lock btc", 0, BITS.load(SeqCst));
    eq("xchg as a lock", all * ROUNDS, PLAIN.get());
    // SAFETY: all are done.
    let Pair([low, high]) = unsafe { PAIR.ptr().read() };
    eq("lock cmpxchg16b, low", all * ROUNDS, low);
    eq("lock cmpxchg16b, high", all * ROUNDS * 2, high);
    if others == 0 {
        report::skip("what needs two processors", "there is one");
        return;
    }
    together(STORE_BUFFER, others, || store_buffer(&X, &Y, true));
    eq("stores and fenced loads: both missed", 0, BAD.load(SeqCst));
    together(MESSAGES, others, send_messages);
    eq("messages: flag before data", 0, BAD.load(SeqCst));
    cross_code(others);
    text_poke(others);
    shootdown(others);
    together(ONE_CLOCK, others, || watch_clock(0));
    eq("TSC steps back between processors", 0, BAD.load(SeqCst));
    again(others);
    x2apic();
}

fn other(step: u32, me: usize) {
    match step {
        INTERRUPTS => {
            apic::write(apic::LDR, 1 << (24 + me));
            while !STOP.load(SeqCst) {
                SLEEPING.fetch_or(1 << me, SeqCst);
                cpu::sti_hlt_cli();
            }
        }
        LOCKED => locked(),
        STORE_BUFFER => store_buffer(&Y, &X, false),
        MESSAGES => take_messages(),
        CROSS_CODE => {
            // SAFETY: a function lies there as long as the step lasts.
            let f: extern "C" fn() -> u32 = unsafe { core::mem::transmute(CODE.load(SeqCst)) };
            let mut last = 0;
            while !STOP.load(SeqCst) {
                let now = f();
                if now < last || now >> 16 != now & 0xffff {
                    BAD.fetch_add(1, SeqCst);
                }
                last = now;
                ANSWER.store(now, SeqCst);
            }
        }
        TEXT_POKE => {
            // SAFETY: a function lies there as long as the step lasts.
            let f: extern "C" fn() -> u32 = unsafe { core::mem::transmute(CODE.load(SeqCst)) };
            while !STOP.load(SeqCst) {
                if f() != 5 {
                    BAD.fetch_add(1, SeqCst);
                }
                ANSWER.fetch_add(1, SeqCst);
            }
        }
        SHOOTDOWN => {
            cpu::sti();
            while !STOP.load(SeqCst) {
                // SAFETY: mapped by the first processor.
                let value = unsafe { (page::TEST as *const u32).read_volatile() };
                ANSWER.store(value, SeqCst);
            }
            cpu::cli();
        }
        ONE_CLOCK => watch_clock(1),
        _ => {}
    }
}

fn count(_: &mut Frame) {
    SEEN[number()].fetch_add(1, SeqCst);
    apic::eoi();
}

fn shoot(_: &mut Frame) {
    cpu::invlpg(page::TEST);
    BACK.fetch_add(1, SeqCst);
    apic::eoi();
}

/// Waits at most half a second for `holds`.
fn soon(holds: impl Fn() -> bool) -> bool {
    for _ in 0..500 {
        if holds() {
            return true;
        }
        clock::wait_ms(1);
    }
    holds()
}

fn own_interrupts() {
    SEEN[0].store(0, SeqCst);
    apic::send(0, 0x4_4000 | u32::from(IPI));
    check(
        "self: pending in IRR",
        apic::read(apic::IRR + 0x10 * (u64::from(IPI) / 32)) & 1 << (IPI % 32) != 0,
    );
    eq("self: not while IF is clear", 0, SEEN[0].load(SeqCst));
    cpu::sti();
    check("self: delivered", soon(|| SEEN[0].load(SeqCst) == 1));
    apic::send(apic::id(), 0x4000 | u32::from(IPI));
    check("self by number: delivered", soon(|| SEEN[0].load(SeqCst) == 2));
    apic::write(apic::TPR, 0x90);
    apic::send(0, 0x4_4000 | u32::from(IPI));
    clock::wait_ms(1);
    eq("TPR holds off", 2, SEEN[0].load(SeqCst));
    eq("CR8 shows TPR", 9, cpu::cr8());
    cpu::set_cr8(8);
    check("CR8 lets through", soon(|| SEEN[0].load(SeqCst) == 3));
    cpu::set_cr8(0);
    cpu::cli();
}

fn interrupts(others: u32) {
    if others == 0 {
        report::skip("interrupts between processors", "there is one");
        return;
    }
    for seen in &SEEN {
        seen.store(0, SeqCst);
    }
    together(INTERRUPTS, others, || {
        let n = others as usize;
        let all = (1u32 << (n + 1)) - 2;
        check("others sleep", soon(|| SLEEPING.load(SeqCst) == all));
        let each = |count: u32| (1..=n).all(|i| SEEN[i].load(SeqCst) == count);
        for id in IDS.iter().take(n + 1).skip(1) {
            apic::send(id.load(SeqCst), 0x4000 | u32::from(IPI));
        }
        check("by number", soon(|| each(1)));
        apic::send(0, 0xc_4000 | u32::from(IPI));
        check("all but self", soon(|| each(2)));
        eq("all but self: not self", 0, SEEN[0].load(SeqCst));
        apic::send(0xff, 0x4000 | u32::from(IPI));
        check("broadcast number", soon(|| each(3)));
        for i in 1..=n {
            apic::send(1 << i, 0x4800 | u32::from(IPI));
        }
        check("by logical number", soon(|| each(4)));
        // A thousand one after the other: each must wake the sleeper.
        let target = IDS[1].load(SeqCst);
        let mut good = true;
        for i in 0..1000 {
            apic::send(target, 0x4000 | u32::from(IPI));
            let mut patience = 100_000_000u64;
            while SEEN[1].load(SeqCst) != 5 + i && patience > 0 {
                patience -= 1;
                core::hint::spin_loop();
            }
            good &= patience > 0;
        }
        check("a thousand wake-ups", good);
        NMIS.store(0, SeqCst);
        apic::send(0, 0xc_4400);
        check("NMI", soon(|| NMIS.load(SeqCst) == others));
        STOP.store(true, SeqCst);
        apic::send(0, 0xc_4000 | u32::from(IPI));
    });
    STOP.store(false, SeqCst);
    apic::send(0, 0x8_4000 | u32::from(IPI));
    cpu::sti();
    // The broadcast above with number FFh was for this one as well.
    check("all with self", soon(|| SEEN[0].load(SeqCst) >= 1));
    cpu::cli();
}

#[repr(align(64))]
struct Lines(#[allow(dead_code)] [u8; 128]);
static LINES: Global<Lines> = Global::new(Lines([0; 128]));

fn split() -> (u64, *mut u64) {
    let at = (LINES.addr() + 60) as *mut u64;
    // SAFETY: inside the array.
    (unsafe { at.read_unaligned() }, at)
}

#[repr(align(4096))]
struct Pages(#[allow(dead_code)] [u8; 8192]);
static PAGES: Global<Pages> = Global::new(Pages([0; 8192]));

/// Eight bytes of which four lie in the next page.
fn over_pages() -> (u64, *mut u64) {
    let at = (PAGES.addr() + 4092) as *mut u64;
    // SAFETY: inside the array.
    (unsafe { at.read_unaligned() }, at)
}

fn locked() {
    let at = split().1;
    let over = over_pages().1;
    for _ in 0..PAGE_ROUNDS {
        // SAFETY: all of it is meant to be shared.
        unsafe {
            core::arch::asm!("lock add qword ptr [{}], 1", in(reg) over);
            core::arch::asm!("lock add dword ptr [{} + 4], 1", in(reg) over);
            core::arch::asm!("lock xadd [{}], {}", in(reg) over, inout(reg) 1u64 => _);
            core::arch::asm!(
                "mov rax, [{at}]", "2: lea {new}, [rax + 1]", "lock cmpxchg [{at}], {new}", "jnz 2b",
                at = in(reg) over, new = out(reg) _, out("rax") _
            );
        }
    }
    for i in 0..ROUNDS {
        // SAFETY: all of it is meant to be shared.
        unsafe {
            core::arch::asm!("lock inc qword ptr [{}]", in(reg) COUNTER.as_ptr());
            core::arch::asm!("lock add byte ptr [{}], 1", in(reg) SUMS[2].as_ptr());
            core::arch::asm!("lock add qword ptr [{}], 1", in(reg) at);
            core::arch::asm!("lock btc qword ptr [{}], {}", in(reg) BITS.as_ptr(), in(reg) i & 63);
            core::arch::asm!("lock btc qword ptr [{}], {}", in(reg) BITS.as_ptr(), in(reg) i & 63);
            core::arch::asm!(
                "mov rsi, rbx", "2: mov rbx, rax", "mov rcx, rdx", "add rbx, 1", "add rcx, 2",
                "lock cmpxchg16b [{at}]", "jnz 2b", "mov rbx, rsi",
                at = in(reg) PAIR.ptr(), inout("rax") 0u64 => _, inout("rdx") 0u64 => _, out("rcx") _, out("rsi") _
            );
        }
        SUMS[0].fetch_add(3, SeqCst);
        let mut old = SUMS[1].load(SeqCst);
        while let Err(now) = SUMS[1].compare_exchange_weak(old, old + 1, SeqCst, SeqCst) {
            old = now;
        }
        while LOCK.swap(true, SeqCst) {
            core::hint::spin_loop();
        }
        PLAIN.set(PLAIN.get() + 1);
        LOCK.store(false, SeqCst);
    }
}

/// Both write their own word, fence, and read the other's: one at least sees the other.
fn store_buffer(mine: &AtomicU32, theirs: &AtomicU32, leads: bool) {
    if leads {
        BAD.store(0, SeqCst);
    }
    for i in 1..=2000 {
        // Both start each round together.
        if leads {
            ROUND.store(i, SeqCst);
        } else {
            while ROUND.load(SeqCst) != i {
                core::hint::spin_loop();
            }
        }
        mine.store(i, core::sync::atomic::Ordering::Relaxed);
        fence(SeqCst);
        let saw = theirs.load(core::sync::atomic::Ordering::Relaxed);
        if leads {
            while BACK.load(SeqCst) != i {
                core::hint::spin_loop();
            }
            if saw != i && ANSWER.load(SeqCst) != i {
                BAD.fetch_add(1, SeqCst);
            }
        } else {
            ANSWER.store(saw, SeqCst);
            BACK.store(i, SeqCst);
        }
    }
}

/// Plain stores in order; whoever sees the second sees the first.
fn send_messages() {
    X.store(0, SeqCst);
    Y.store(0, SeqCst);
    for i in 1..=100_000u32 {
        X.store(i, core::sync::atomic::Ordering::Relaxed);
        core::sync::atomic::compiler_fence(SeqCst);
        Y.store(i, core::sync::atomic::Ordering::Relaxed);
    }
}

fn take_messages() {
    BAD.store(0, SeqCst);
    loop {
        let flag = Y.load(core::sync::atomic::Ordering::Relaxed);
        core::sync::atomic::compiler_fence(SeqCst);
        let data = X.load(core::sync::atomic::Ordering::Relaxed);
        if flag <= 100_000 && data < flag && data != 0 {
            BAD.fetch_add(1, SeqCst);
        }
        if flag == 100_000 {
            return;
        }
    }
}

/// One processor rewrites the constant of a function that the other calls.
fn cross_code(others: u32) {
    let frame = page::fresh();
    // mov eax, imm32 with an aligned constant; ret.
    // SAFETY: a fresh page.
    unsafe {
        ((frame + 3) as *mut u8).write_volatile(0xb8);
        ((frame + 4) as *mut u32).write_volatile(0);
        ((frame + 8) as *mut u8).write_volatile(0xc3);
    }
    CODE.store(frame + 3, SeqCst);
    BAD.store(0, SeqCst);
    STOP.store(false, SeqCst);
    let mut good = true;
    together(CROSS_CODE, others, || {
        for i in 1..=300u32 {
            let value = i << 16 | i;
            // SAFETY: as above; an aligned store is seen whole.
            unsafe { ((frame + 4) as *mut u32).write_volatile(value) };
            if i % 10 == 0 {
                good &= soon(|| ANSWER.load(SeqCst) == value);
            }
        }
        STOP.store(true, SeqCst);
    });
    check("code from another processor is seen", good);
    eq("code from another processor: old after new, or torn", 0, BAD.load(SeqCst));
}

/// One processor puts INT3 over a two-byte NOP and takes it away again, as kernels do to patch themselves, while the
/// other runs over it: it meets the NOP or the breakpoint, never anything else.
fn text_poke(others: u32) {
    let frame = page::fresh();
    // nop (66 90); mov eax, 5; ret.
    for (i, byte) in [0x66u8, 0x90, 0xb8, 5, 0, 0, 0, 0xc3].into_iter().enumerate() {
        // SAFETY: a fresh page.
        unsafe { ((frame + i as u64) as *mut u8).write_volatile(byte) };
    }
    // Behind INT3 lies the second byte of the NOP.
    trap::handle(3, Some(|frame| frame.rip += 1));
    CODE.store(frame, SeqCst);
    BAD.store(0, SeqCst);
    ANSWER.store(0, SeqCst);
    STOP.store(false, SeqCst);
    together(TEXT_POKE, others, || {
        while ANSWER.load(SeqCst) == 0 {
            core::hint::spin_loop();
        }
        for i in 0..4000u32 {
            let byte = if i % 2 == 0 { 0xcc } else { 0x66 };
            // SAFETY: as above.
            unsafe { (frame as *mut u8).write_volatile(byte) };
            for _ in 0..i % 50 {
                core::hint::spin_loop();
            }
        }
        STOP.store(true, SeqCst);
    });
    trap::handle(3, None);
    eq("breakpoints come and go: wrong results", 0, BAD.load(SeqCst));
}

fn shootdown(others: u32) {
    let frames = [page::fresh(), page::fresh()];
    for (i, frame) in frames.into_iter().enumerate() {
        // SAFETY: a fresh page.
        unsafe { (frame as *mut u32).write_volatile(100 + i as u32) };
    }
    page::map(page::TEST, 1, frames[0] | P | W);
    STOP.store(false, SeqCst);
    BACK.store(0, SeqCst);
    let mut good = true;
    together(SHOOTDOWN, others, || {
        for i in 1..=100usize {
            page::map(page::TEST, 1, frames[i & 1] | P | W);
            apic::send(IDS[1].load(SeqCst), 0x4000 | u32::from(SHOOT));
            good &= soon(|| BACK.load(SeqCst) == i as u32);
            let value = 100 + (i & 1) as u32;
            good &= soon(|| ANSWER.load(SeqCst) == value);
        }
        STOP.store(true, SeqCst);
    });
    check("translations are dropped on request", good);
}

/// Two processors take turns: each one's clock is not before what the other has read.
fn watch_clock(me: u32) {
    if me == 0 {
        BAD.store(0, SeqCst);
        CLOCK.store(0, SeqCst);
        ROUND.store(0, SeqCst);
    }
    for i in 0..2000u32 {
        let turn = i * 2 + me;
        while ROUND.load(SeqCst) != turn {
            core::hint::spin_loop();
        }
        let now = cpu::rdtsc();
        if now < CLOCK.load(SeqCst) {
            BAD.fetch_add(1, SeqCst);
        }
        CLOCK.store(now, SeqCst);
        ROUND.store(turn + 1, SeqCst);
    }
}

/// INIT takes a processor out of whatever it does; SIPI starts it anew.
fn again(others: u32) {
    let before = smp::ONLINE.load(SeqCst);
    let after = smp::start(|_| {}, 50);
    eq("all start a second time", before + others, after);
}

fn x2apic() {
    if cpu::cpuid(1, 0)[2] & 1 << 21 == 0 {
        report::skip("x2APIC", "the processor has none");
        return;
    }
    let id = apic::id();
    let base = cpu::rdmsr(msr::APIC_BASE);
    cpu::wrmsr(msr::APIC_BASE, base | 1 << 10);
    eq("x2APIC: number", u64::from(id), cpu::rdmsr(0x802));
    let before = SEEN[0].load(SeqCst);
    trap::handle(
        IPI,
        Some(|_| {
            SEEN[0].fetch_add(1, SeqCst);
            cpu::wrmsr(0x80b, 0);
        }),
    );
    cpu::wrmsr(0x83f, IPI.into());
    cpu::sti();
    check("x2APIC: self", soon(|| SEEN[0].load(SeqCst) == before + 1));
    cpu::wrmsr(0x830, u64::from(id) << 32 | u64::from(IPI));
    check("x2APIC: by number", soon(|| SEEN[0].load(SeqCst) == before + 2));
    cpu::cli();
    eq("x2APIC: logical number", 1 << (id & 15) | id >> 4 << 16, cpu::rdmsr(0x80d) as u32);
}
