//! Code that writes code: the next instruction, the running loop, over page borders, through other addresses,
//! by every kind of store, under another mode. Without any serialising instruction, as the processors that we
//! follow keep their caches coherent after a jump, and in practice at once (Intel SDM vol. 3A, 10.1.3, 14.6).
#![no_std]
#![no_main]

use kit::page::{self, P, TEST, W};
use kit::{Global, USER, check, cpu::selector, eq, trap};

kit::guest!(main);

core::arch::global_asm!(
    r#"
    .balign 4096
# Writes the constant of the instruction right behind the store.
smc_next:
    mov byte ptr [rip + 2f + 1], dil
2:  mov al, 0
    movzx eax, al
    ret
# The same with the whole instruction in one store: mov al, imm8 becomes mov ah, imm8.
smc_next_whole:
    xor eax, eax
    mov word ptr [rip + 2f], di
2:  mov al, 0
    movzx eax, ax
    ret
# A loop whose body adds what the last round wrote.
smc_loop:
    xor eax, eax
    mov ecx, edi
3:  add eax, 0x11111111
    mov dword ptr [rip + 3b + 1], ecx
    dec ecx
    jnz 3b
    mov dword ptr [rip + 3b + 1], 0x11111111
    ret
# A jump that is aimed anew each round.
smc_jump:
    xor eax, eax
    mov ecx, edi
4:  xor byte ptr [rip + 5f + 1], 2
5:  jmp 6f
    inc eax
    inc eax
6:  inc eax
    add eax, 16
    dec ecx
    jnz 4b
    ret
# A call that writes the code it returns to.
smc_return:
    call 7f
    mov eax, 1
    ret
7:  mov rax, [rsp]
    mov dword ptr [rax + 1], edi
    ret
# Writes by push onto the code ahead.
smc_push:
    mov rdx, rsp
    lea rsp, [rip + 8f + 8]
    push rdi
8:  .byte 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90
    mov rsp, rdx
    ret
# Writes far behind itself and goes there.
smc_behind:
    jmp 2f
3:  mov eax, 0
    ret
2:  mov dword ptr [rip + 3b + 1], edi
    jmp 3b
# rep stosb over the code ahead, which would clear EAX.
smc_rep:
    xor eax, eax
    mov rdx, rdi
    lea rdi, [rip + 9f]
    mov ecx, 8
    mov al, 0x90
    rep stosb
    mov eax, edx
9:  .byte 0x31, 0xc0, 0x31, 0xc0, 0x31, 0xc0, 0x31, 0xc0
    ret
    .balign 4096
smc_end:
"#
);
unsafe extern "C" {
    fn smc_next(value: u64) -> u64;
    fn smc_next_whole(value: u64) -> u64;
    fn smc_loop(value: u64) -> u64;
    fn smc_jump(value: u64) -> u64;
    fn smc_return(value: u64) -> u64;
    fn smc_push(value: u64) -> u64;
    fn smc_behind(value: u64) -> u64;
    fn smc_rep(value: u64) -> u64;
}

#[repr(align(4096))]
struct Pages(#[allow(dead_code)] [u8; 4 * 4096]);
static PAGES: Global<Pages> = Global::new(Pages([0; 4 * 4096]));

fn bytes(at: u64, code: &[u8]) {
    for (i, byte) in code.iter().enumerate() {
        // SAFETY: inside PAGES, or mapped by the test.
        unsafe { (at as *mut u8).add(i).write_volatile(*byte) };
    }
}
/// mov eax, value; ret
fn constant(at: u64, value: u32) {
    let v = value.to_le_bytes();
    bytes(at, &[0xb8, v[0], v[1], v[2], v[3], 0xc3]);
}
fn call(at: u64) -> u64 {
    let f: extern "C" fn() -> u64 =
        // SAFETY: the test put code there.
        unsafe { core::mem::transmute(at) };
    f()
}

fn main() {
    in_place();
    kinds_of_store();
    generated();
    borders();
    aliases();
    modes();
}

fn in_place() {
    let all = |f: unsafe extern "C" fn(u64) -> u64, want: fn(u64) -> u64| {
        // SAFETY: each writes its own code alone.
        (1..=200).all(|i| unsafe { f(i) } == want(i))
    };
    check("next instruction", all(smc_next, |i| i));
    check(
        "next instruction, opcode",
        (0..200u64).all(|i| {
            let (op, shift) = if i & 1 == 0 { (0xb0, 0) } else { (0xb4, 8) };
            // SAFETY: as above.
            unsafe { smc_next_whole(op | i << 8) == i << shift }
        }),
    );
    // 11111111h + n + (n-1) + ... + 2
    check("running loop", all(smc_loop, |n| 0x1111_1111 + n * (n + 1) / 2 - 1));
    // SAFETY: as above. An even number of rounds leaves the jump as it was.
    check("running jump", (1..20u64).all(|n| unsafe { smc_jump(n * 2) } == n * 2 * 16 + n));
    check("code returned to", all(smc_return, |i| i));
    check("code behind", all(smc_behind, |i| i));
    // mov eax, imm32 and nops, pushed.
    check(
        "pushed code",
        (0..100u64).all(|i| {
            // SAFETY: as above.
            unsafe { smc_push(0x90_9090_0000_0000b8 | i << 8) & 0xffff_ffff == i }
        }),
    );
    // SAFETY: as above.
    eq("rep stosb ahead", 0x1234, unsafe { smc_rep(0x1234) });
}

/// Each kind of store changes a function that ran before.
fn kinds_of_store() {
    let at = PAGES.addr();
    let imm = at + 1;
    macro_rules! by {
        ($what:literal, $value:expr, $($asm:tt)*) => {{
            constant(at, 0x5555_5555);
            eq("before", 0x5555_5555, call(at));
            // SAFETY: writes the constant of the function.
            unsafe { core::arch::asm!($($asm)*) };
            eq($what, $value, call(at));
        }};
    }
    by!("by mov 8", 0x5555_5577, "mov byte ptr [{}], 0x77", in(reg) imm);
    by!("by mov 16", 0x5555_7788, "mov word ptr [{}], 0x7788", in(reg) imm);
    by!("by mov 32", 0x1234_5678, "mov dword ptr [{}], 0x12345678", in(reg) imm);
    by!("by mov 64", 0x0203_0405, "mov [{}], {}", in(reg) at, in(reg) 0x9090_c302_0304_05b8u64);
    by!("by add", 0x5555_5556, "add byte ptr [{}], 1", in(reg) imm);
    by!("by lock xadd", 0x5555_5558, "lock xadd [{}], {:e}", in(reg) imm, inout(reg) 3 => _);
    by!("by xchg", 99, "xchg [{}], {:e}", in(reg) imm, inout(reg) 99 => _);
    by!("by cmpxchg", 98, "lock cmpxchg [{}], {:e}", in(reg) imm, in(reg) 98, inout("eax") 0x5555_5555u32 => _);
    by!("by not", 0xaaaa_aaaa, "not dword ptr [{}]", in(reg) imm);
    by!("by bts", 0x5555_5557, "bts dword ptr [{}], 1", in(reg) imm);
    by!("by shl", 0xaaaa_aaaa, "shl dword ptr [{}], 1", in(reg) imm);
    by!("by setcc", 0x5555_5501, "cmp eax, eax; sete byte ptr [{}]", in(reg) imm);
    by!("by stosd", 7, "stosd", inout("rdi") imm => _, in("eax") 7);
    let source: [u8; 8] = 0x6655u64.to_le_bytes();
    by!("by movsb", 0x5555_5555, "movsb", inout("rdi") imm => _, inout("rsi") source.as_ptr() => _);
    by!("by rep movsb", 0x6655, "rep movsb", inout("rdi") imm => _, inout("rsi") source.as_ptr() => _,
        inout("rcx") 4u64 => _);
    by!("by rep movsd backwards", 0x6655, "std; rep movsd; cld", inout("rdi") imm => _,
        inout("rsi") source.as_ptr() => _, inout("rcx") 1u64 => _);
    by!("by movd", 0x6655, "movd xmm0, {:e}; movd dword ptr [{}], xmm0", in(reg) 0x6655, in(reg) imm, out("xmm0") _);
    by!("by movups", 0x0203_0405, "movq xmm0, {}; punpcklqdq xmm0, xmm0; movups [{}], xmm0",
        in(reg) 0x9090_c302_0304_05b8u64, in(reg) at, out("xmm0") _);
    by!("by movnti", 0x4433_2211, "movnti [{}], {:e}; sfence", in(reg) imm, in(reg) 0x4433_2211);
    by!("by fist", 77, "push 77; fild qword ptr [rsp]; fistp dword ptr [{}]; pop rax", in(reg) imm, out("rax") _);
    let rsp = imm + 8;
    by!("by push", 0x0203_0405, "mov {t}, rsp; mov rsp, {}; push {}; mov rsp, {t}", in(reg) rsp - 1,
        in(reg) 0x9090_c302_0304_05b8u64, t = out(reg) _);
    // A single byte beside the function is none of its business.
    constant(at, 5);
    let mut sum = 0;
    for i in 0..20_000u32 {
        bytes(at + 64 + u64::from(i & 63), &[i as u8]);
        sum += call(at);
    }
    eq("data beside code", 100_000, sum);
}

fn generated() {
    let at = PAGES.addr();
    let mut good = true;
    for i in 0..3000u32 {
        // A sum of i & 7 constants, so that lengths differ.
        let mut code = [0x90u8; 64];
        code[..2].copy_from_slice(&[0x31, 0xc0]);
        let mut len = 2;
        let mut want = 0u32;
        for k in 0..i & 7 {
            let value = i.wrapping_mul(k + 1);
            want = want.wrapping_add(value);
            code[len] = 5;
            code[len + 1..len + 5].copy_from_slice(&value.to_le_bytes());
            len += 5;
        }
        code[len] = 0xc3;
        // Another place each time, over what was there before.
        let place = at + u64::from(i * 37 % 4000);
        bytes(place, &code[..=len]);
        good &= call(place) == u64::from(want);
    }
    check("generated three thousand times", good);
    // Many functions in one page, one of them rewritten at a time.
    for i in 0..256u64 {
        constant(at + i * 16, i as u32);
    }
    let mut good = true;
    for round in 0..256u64 {
        constant(at + round * 16, 1000 + round as u32);
        for i in (0..256).step_by(17) {
            let want = if i <= round { 1000 + i } else { i };
            good &= call(at + i * 16) == want;
        }
    }
    check("one of many", good);
    // A function that another one has called directly.
    constant(at + 512, 11);
    // call at+512; add eax, 1; ret
    let distance = (512i32 - 256 - 5).to_le_bytes();
    bytes(at + 256, &[0xe8, distance[0], distance[1], distance[2], distance[3], 0x83, 0xc0, 1, 0xc3]);
    eq("called function", 12, call(at + 256));
    constant(at + 512, 21);
    eq("called function, rewritten", 22, call(at + 256));
    bytes(at + 256 + 7, &[9]);
    eq("calling function, rewritten", 30, call(at + 256));
}

fn borders() {
    let at = PAGES.addr() + 4096;
    for ahead in 1..6u64 {
        let f = at - ahead;
        constant(f, 0x0102_0304);
        eq("over a border", 0x0102_0304, call(f));
        bytes(at, &[0xc3]);
        constant(f, 0x0506_0708);
        eq("over a border, both written", 0x0506_0708, call(f));
        if ahead < 5 {
            // The last byte of the constant lies in the second page.
            bytes(f + 4, &[0x77]);
            eq("over a border, second written", 0x7706_0708, call(f));
        }
        if ahead > 1 {
            bytes(f + 1, &[0x66]);
            eq("over a border, first written", 0x66, call(f) & 0xff);
        }
    }
    // One store over the border, of which both pages hold code.
    constant(at - 6, 1);
    constant(at, 2);
    eq("first neighbour", 1, call(at - 6));
    eq("second neighbour", 2, call(at));
    // SAFETY: overwrites ret of the first, mov of the second.
    unsafe { ((at - 1) as *mut u32).write_unaligned(0x0004_b890) };
    // mov eax, 1; nop; mov eax, 4; ret
    eq("one store over both", 4, call(at - 6));
}

fn aliases() {
    let (a, b) = (TEST + 0x4000_0000, TEST + 0x5000_0000);
    let frame = page::fresh();
    page::map(a, 1, frame | P | W);
    page::map(b, 1, frame | P | W);
    let mut good = true;
    for i in 0..200u32 {
        constant([a, b, frame][i as usize % 3], i);
        good &= [a, b, frame].into_iter().all(|at| call(at) == u64::from(i));
    }
    check("written at one address, run at others", good);
    // A large page over the same frame.
    let large = TEST + (3 << 30);
    page::map(large, 2, frame & !0x1f_ffff | P | W | page::LARGE);
    let through = large + (frame & 0x1f_ffff);
    constant(through, 1234);
    eq("written through a large page", 1234, call(a));
    constant(a, 4321);
    eq("run through a large page", 4321, call(through));
    // Code that writes itself through its other address.
    // mov byte ptr [rip + distance], 9; mov al, 0; ret
    let distance = ((b - a) as u32).wrapping_add(1).to_le_bytes();
    bytes(a, &[0xc6, 0x05, distance[0], distance[1], distance[2], distance[3], 9, 0xb0, 0, 0xc3]);
    eq("writes its next instruction through an alias", 9, call(a) & 0xff);
}

/// The same bytes mean something else in another mode.
fn modes() {
    let at = PAGES.addr();
    // xor eax, eax; 40h 90h (nop, or inc eax and nop); int 80h
    bytes(at, &[0x31, 0xc0, 0x40, 0x90, 0xcd, 0x80]);
    let enter = |cs: u16| {
        let entry = trap::Entry {
            rip: at + USER,
            cs: cs.into(),
            rflags: 2,
            rsp: trap::stack_top(2) + USER - 16,
            ss: selector::USER_DATA.into(),
            argument: 0,
        };
        trap::enter(&entry).frame.rax & 0xffff_ffff
    };
    let mut good = true;
    for _ in 0..20 {
        good &= enter(selector::USER_CODE) == 0;
        good &= enter(selector::USER_CODE32) == 1;
    }
    check("same bytes in two modes", good);
    // Written by the supervisor's address, run at the user's.
    bytes(at, &[0xb8, 1, 0, 0, 0, 0xcd, 0x80]);
    eq("user's code", 1, enter(selector::USER_CODE));
    bytes(at + 1, &[2]);
    eq("user's code, rewritten by the supervisor", 2, enter(selector::USER_CODE));
}
