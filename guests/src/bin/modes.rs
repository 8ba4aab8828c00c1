//! 32-bit and 16-bit code under long mode, segments with limits, far transfers, call gates, SYSENTER, 32-bit
//! SYSRET, and the way down to real mode and back (Intel SDM vol. 3A, chapters 3, 6, 11).
#![no_std]
#![no_main]

use kit::cpu::{self, msr, selector as sel};
use kit::page::{self, LARGE, P, W};
use kit::trap::{self, DONE, Entry, Trap, catch};
use kit::{Global, USER, check, eq, report, snippet};

kit::guest!(main);

/// What assembler writes and the tests read.
#[unsafe(no_mangle)]
static SEEN: Global<[u64; 32]> = Global::new([0; 32]);

/// A snippet of 32-bit code at CPL 0, entered from 64-bit code and left to it.
macro_rules! snippet32 {
    ($name:ident, $at:ident, $before:literal, $it:literal) => {
        snippet!(
            $name,
            $at,
            concat!("push 0x30; lea rax, [rip + 2f]; push rax; retfq; .code32; 2: ", $before),
            $it,
            ".byte 0xea; .long 3f; .word 8; .code64; 3: mov ecx, 0x10; mov ds, ecx; mov es, ecx; mov ss, ecx"
        );
    };
}

/// A snippet of 32-bit code for the user; its end is INT 80h.
macro_rules! user32 {
    ($name:ident, $at:ident, $before:literal, $it:literal) => {
        snippet!($name, $at, concat!(".code32; ", $before), $it, "int 0x80; .code64");
    };
}

snippet32!(c_into, c_into_at, "mov al, 0x7f; add al, 1", "into");
snippet32!(c_into_not, c_into_not_at, "mov al, 1; add al, 1", "into");
snippet32!(c_bound, c_bound_at, "push 5; push 1; mov eax, 9", "bound eax, [esp]");
snippet32!(c_load, c_load_at, "mov ds, edi", "mov eax, [0xffd]");
snippet32!(c_load_in, c_load_in_at, "mov ds, edi", "mov eax, [0xffc]");
snippet32!(c_load_1000, c_load_1000_at, "mov ds, edi", "mov eax, [0x1000]");
snippet32!(c_store, c_store_at, "mov ds, edi; mov eax, [0xf00]", "mov [0xf00], eax");
snippet32!(c_store_cs, c_store_cs_at, "mov eax, cs:[0xf00]", "mov cs:[0xf00], eax");
snippet32!(c_push, c_push_at, "mov eax, edi; mov ss, eax", "push eax");
snippet32!(c_jump_limit, c_jump_limit_at, "", ".byte 0xea; .long 0x1000; .word 0x78");
snippet32!(c_ud, c_ud_at, "", "ud2");
snippet32!(c_int, c_int_at, "", "int 0x41");
snippet32!(c_pf, c_pf_at, "", "mov eax, [edi]");
snippet32!(c_wrap, c_wrap_at, "mov ebx, 0x10; mov ds, ebx; mov ebx, -16", "mov eax, [ebx + SEEN + 16]");

user32!(u_done, u_done_at, "mov ecx, esp; push 7; sub ecx, esp", "nop");
user32!(u_hlt, u_hlt_at, "", "hlt");
user32!(u_int3, u_int3_at, "", "int3");
user32!(u_syscall, u_syscall_at, "mov ebx, esp", "syscall");
user32!(
    u_far64,
    u_far64_at,
    "",
    ".byte 0xea; .long 1f + 0x40000000; .word 0x2b; .code64; 1: mov r8d, 5; .code32"
);

// Far transfers from 64-bit code. The operand is built on the stack.
snippet!(far_call64, far_call64_at, "push rdi; push 0", ".byte 0x48, 0xff, 0x1c, 0x24", "add rsp, 16");
snippet!(
    far_call32,
    far_call32_at,
    "mov eax, edi; shl rax, 32; push rax",
    ".byte 0xff, 0x1c, 0x24",
    "add rsp, 8"
);
snippet!(
    far_jump64,
    far_jump64_at,
    "push 8; lea rax, [rip + 1f]; push rax",
    ".byte 0x48, 0xff, 0x2c, 0x24",
    "ud2; 1: add rsp, 16"
);
snippet!(
    far_jump32,
    far_jump32_at,
    "push 8; lea eax, [rip + 1f]; mov rcx, 0x800000000; or rax, rcx; push rax",
    ".byte 0xff, 0x2c, 0x24",
    "ud2; 1: add rsp, 16"
);
snippet!(
    far_return_pop,
    far_return_pop_at,
    "mov rdx, rsp; push 77; push 8; lea rax, [rip + 1f]; push rax",
    "retfq 8",
    "ud2; 1: sub rdx, rsp; mov [SEEN], rdx"
);
snippet!(
    far_return32,
    far_return32_at,
    "mov rdx, rsp; lea eax, [rip + 1f]; mov rcx, 0x800000000; or rax, rcx; push rax",
    "retf",
    "ud2; 1: sub rdx, rsp; mov [SEEN], rdx"
);
snippet!(sysenter64, sysenter64_at, "lea rdx, [rip + 98f]; mov rcx, rsp", "sysenter");
snippet!(syscall64, syscall64_at, "", "syscall", "int 0x80");

core::arch::global_asm!(
    r#"
# Through a call gate: notes what lies on the stack.
gate_door:
    mov rax, [rsp]
    mov [SEEN], rax
    mov rax, [rsp + 8]
    mov [SEEN + 8], rax
    mov rax, [rsp + 16]
    mov [SEEN + 16], rax
    mov rax, [rsp + 24]
    mov [SEEN + 24], rax
    mov [SEEN + 32], rsp
    mov rax, cs
    mov [SEEN + 40], rax
    mov rax, ss
    mov [SEEN + 48], rax
    retfq
sysenter_door:
    mov [SEEN], rsp
    mov rax, cs
    mov [SEEN + 8], rax
    mov rax, ss
    mov [SEEN + 16], rax
    pushfq
    pop rax
    mov [SEEN + 24], rax
    cmp qword ptr [SEEN + 32], 0
    jne 1f
    .byte 0x48, 0x0f, 0x35
1:  mov rax, 0x40000000
    lea rdx, [rip + 2f]
    add rdx, rax
    sysexit
    .code32
2:  int 0x80
    .code64
sysret32_door:
    mov [SEEN], rcx
    .byte 0x0f, 0x07
cstar_door:
    mov [SEEN], rcx
    mov rcx, [SEEN]
    .byte 0x0f, 0x07

# 32-bit code that does what 64-bit code cannot.
compat_work:
    push rbx
    push rbp
    mov [SEEN + 248], rsp
    push 0x30
    lea rax, [rip + 1f]
    push rax
    retfq
    .code32
1:  mov eax, -1
    .byte 0x40
    setz byte ptr [SEEN]
    mov ebx, esp
    push eax
    sub ebx, esp
    add esp, 4
    mov [SEEN + 8], ebx
    mov ebx, esp
    .byte 0x66, 0x6a, 5
    sub ebx, esp
    add esp, 2
    mov [SEEN + 16], ebx
    mov ecx, 0x1111
    mov edx, 0x2222
    mov ebx, esp
    pushad
    xor ecx, ecx
    xor edx, edx
    sub ebx, esp
    mov [SEEN + 24], ebx
    popad
    shl edx, 16
    or ecx, edx
    mov [SEEN + 32], ecx
    mov al, 0x79
    add al, 0x35
    daa
    setc ah
    mov [SEEN + 40], ax
    mov al, 0x35
    sub al, 0x47
    das
    setc ah
    mov [SEEN + 48], ax
    mov ax, 0x000f
    aaa
    mov [SEEN + 56], ax
    mov ax, 0x0201
    sub al, 3
    aas
    mov [SEEN + 64], ax
    mov al, 123
    aam
    mov [SEEN + 72], ax
    aad
    mov [SEEN + 80], ax
    stc
    .byte 0xd6
    mov [SEEN + 88], al
    mov eax, 0x10
    mov ebx, 3
    arpl ax, bx
    setz bl
    mov [SEEN + 96], eax
    mov [SEEN + 104], bl
    mov bx, 0xfff0
    mov si, 0x20
    lea ecx, [bx + si + 5]
    mov [SEEN + 112], ecx
    mov ebx, esp
    .byte 0x9a
    .long 2f
    .word 0x30
    mov [SEEN + 128], esp
    sub [SEEN + 128], ebx
    jmp 3f
2:  sub ebx, esp
    mov [SEEN + 120], ebx
    add ebx, esp
    retf
3:  push 0x10
    push 0x12345678
    les edi, [esp]
    add esp, 8
    mov [SEEN + 136], edi
    mov ecx, es
    mov [SEEN + 144], ecx
    mov ecx, 0x10001
    xor eax, eax
4:  inc eax
    .byte 0x67, 0xe2, 0xfc
    mov [SEEN + 152], eax
    int 0x41
    mov eax, cs
    mov [SEEN + 160], eax
    push 0x10
    pop fs
    mov eax, fs
    mov [SEEN + 168], eax
    .byte 0x82, 0xc0, 0x05
    # To 16-bit code in the first 64 KiB, and from there back to 64-bit code.
    .byte 0xea
    .long 0xa000
    .word 0x38
    .code16
compat16:
    .byte 0x89, 0xe0
    .byte 0x50
    .byte 0x29, 0xe0
    .byte 0x59
    .byte 0x66, 0xa3
    .word 0xaf00
    .byte 0x66, 0xea
    .long 5f
    .word 8
compat16_end:
    .code64
5:  mov rsp, [SEEN + 248]
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    xor eax, eax
    mov fs, eax
    pop rbp
    pop rbx
    ret
"#
);
unsafe extern "C" {
    fn gate_door();
    fn sysenter_door();
    fn sysret32_door();
    fn cstar_door();
    fn compat_work();
    static compat16: u8;
    static compat16_end: u8;
}

fn expect(what: &str, trap: Option<Trap>, vector: u64, error: u64, rip: u64, cs: u16) {
    let Some(t) = trap else {
        report::fail(what, format_args!("expected vector {vector} got nothing"));
        return;
    };
    let f = &t.frame;
    if f.vector == vector && f.error == error && f.rip == rip && f.cs == u64::from(cs) {
        report::pass(what);
    } else {
        report::fail(
            what,
            format_args!(
                "expected vector {vector} error {error:#x} at {cs:#x}:{rip:#x}, got vector {} error {:#x} at {:#x}:{:#x}",
                f.vector, f.error, f.cs, f.rip
            ),
        );
    }
}

fn main() {
    // TCG does not look at limits and rights of data segments.
    report::tcg_fails(&[
        "compat: #GP null ds",
        "compat: load beyond the limit",
        "compat: stack segment limit",
        "compat: store to read-only data",
        "compat: store to code",
        "compat: expand-down below",
        "user compat: #UD syscall (Intel)",
    ]);
    compatibility();
    compatibility_faults();
    user_compatibility();
    far_transfers();
    call_gates();
    sysenter();
    sysret32();
    descriptors();
    real::test();
}

fn compatibility() {
    // SAFETY: the page at A000h is free low memory.
    unsafe {
        let from = &raw const compat16;
        let len = (&raw const compat16_end).offset_from(from) as usize;
        core::ptr::copy_nonoverlapping(from, 0xa000 as *mut u8, len);
    }
    static CS: Global<u64> = Global::new(0);
    trap::handle(0x41, Some(|frame| CS.set(frame.cs)));
    SEEN.set([0; 32]);
    // SAFETY: keeps the registers that it must.
    unsafe { compat_work() };
    trap::handle(0x41, None);
    let s = SEEN.get();
    for (what, got, expected) in [
        ("compat: 40h is inc eax", s[0], 1),
        ("compat: push is 4 bytes", s[1], 4),
        ("compat: 16-bit push is 2 bytes", s[2], 2),
        ("compat: pushad is 32 bytes", s[3], 32),
        ("compat: popad", s[4], 0x2222_1111),
        ("compat: daa", s[5], 0x0114),
        ("compat: das", s[6], 0x0188),
        ("compat: aaa", s[7], 0x0105),
        ("compat: aas", s[8], 0x0108),
        ("compat: aam", s[9], 0x0c03),
        ("compat: aad", s[10], 123),
        ("compat: salc", s[11], 0xff),
        ("compat: arpl", s[12], 0x13),
        ("compat: arpl sets ZF", s[13], 1),
        ("compat: 16-bit address wraps", s[14], 0x15),
        ("compat: far call pushes 8", s[15], 8),
        ("compat: far return pops 8", s[16], 0),
        ("compat: les offset", s[17], 0x1234_5678),
        ("compat: les selector", s[18], 0x10),
        ("compat: loop by cx", s[19], 1),
        ("compat: cs after an interrupt", s[20] & 0xffff, 0x30),
        ("compat: pop fs", s[21] & 0xffff, 0x10),
    ] {
        eq(what, expected, got);
    }
    eq("compat: cs that an interrupt pushes", 0x30, CS.get());
    // SAFETY: written by the 16-bit code.
    eq("16-bit compat: push is 2 bytes", 2, unsafe { (0xaf00 as *const u16).read_volatile() });
}

fn compatibility_faults() {
    let k32 = sel::CODE32;
    let spare = u64::from(sel::SPARE);
    expect("compat: #OF into", catch(c_into, 0), 4, 0, c_into_at[1], k32);
    check("compat: into without OF", catch(c_into_not, 0).is_none());
    expect("compat: #BR bound", catch(c_bound, 0), 5, 0, c_bound_at[0], k32);
    expect("compat: #UD", catch(c_ud, 0), 6, 0, c_ud_at[0], k32);
    expect("compat: int 41h", catch(c_int, 0), 0x41, 0, c_int_at[1], k32);
    // No RAM there, and no test either.
    let hole = 0x3fe0_0000;
    page::map(hole, 2, 0);
    let t = catch(c_pf, hole + 5);
    expect("compat: #PF", t, 14, 0, c_pf_at[0], k32);
    eq("compat: #PF CR2", hole + 5, t.unwrap_or_default().cr2);
    page::map(hole, 2, hole | P | W | LARGE);
    expect("compat: #GP null ds", catch(c_load, 0), 13, 0, c_load_at[0], k32);
    check("compat: 32-bit address wraps", catch(c_wrap, 0).is_none());
    // 4096 bytes of data at 0.
    cpu::set_descriptor(sel::SPARE, 0x0040_9300_0000_0fff);
    check("compat: load inside the limit", catch(c_load_in, spare).is_none());
    expect("compat: load beyond the limit", catch(c_load, spare), 13, 0, c_load_at[0], k32);
    check("compat: store", catch(c_store, spare).is_none());
    expect("compat: stack segment limit", catch(c_push, spare), 12, 0, c_push_at[0], k32);
    cpu::set_descriptor(sel::SPARE, 0x0040_9100_0000_0fff);
    expect("compat: store to read-only data", catch(c_store, spare), 13, 0, c_store_at[0], k32);
    expect("compat: store to code", catch(c_store_cs, 0), 13, 0, c_store_cs_at[0], k32);
    // Expand-down: everything above FFFh.
    cpu::set_descriptor(sel::SPARE, 0x0040_9700_0000_0fff);
    expect("compat: expand-down below", catch(c_load_in, spare), 13, 0, c_load_in_at[0], k32);
    check("compat: expand-down above", catch(c_load_1000, spare).is_none());
    // 32-bit code of 4096 bytes.
    cpu::set_descriptor(sel::SPARE, 0x0040_9b00_0000_0fff);
    expect("compat: jump beyond the limit", catch(c_jump_limit, 0), 13, 0, c_jump_limit_at[0], k32);
    cpu::set_descriptor(sel::SPARE, 0);
}

fn user32_entry(function: unsafe extern "C" fn(u64) -> u64) -> Entry {
    Entry { cs: sel::USER_CODE32.into(), ..trap::user_entry(function, 0) }
}

fn user_compatibility() {
    let u32 = sel::USER_CODE32;
    let t = trap::enter(&user32_entry(u_done));
    eq("user compat: came back", DONE, t.frame.vector);
    eq("user compat: cs", u32.into(), t.frame.cs);
    eq("user compat: push is 4 bytes", 4, t.frame.rcx);
    expect("user compat: #GP hlt", Some(trap::enter(&user32_entry(u_hlt))), 13, 0, u_hlt_at[0] + USER, u32);
    expect("user compat: #BP", Some(trap::enter(&user32_entry(u_int3))), 3, 0, u_int3_at[1] + USER, u32);
    let t = trap::enter(&user32_entry(u_far64));
    eq("user compat: jump to 64-bit code", 5, t.frame.r8);
    eq("user compat: cs then", sel::USER_CODE.into(), t.frame.cs);

    cpu::wrmsr(msr::STAR, 0x18 << 48 | 0x08 << 32);
    cpu::wrmsr(msr::CSTAR, cstar_door as *const () as u64);
    let t = trap::enter(&user32_entry(u_syscall));
    if cpu::intel() {
        expect("user compat: #UD syscall (Intel)", Some(t), 6, 0, u_syscall_at[0] + USER, u32);
    } else {
        eq("user compat: syscall by CSTAR (AMD)", DONE, t.frame.vector);
        eq("user compat: syscall ecx", u_syscall_at[1] + USER, SEEN.get()[0]);
        eq("user compat: sysret cs", u32.into(), t.frame.cs);
    }
}

fn far_transfers() {
    check("far jump m16:64", catch(far_jump64, 0).is_none());
    check("far jump m16:32", catch(far_jump32, 0).is_none());
    SEEN.set([1; 32]);
    check("far return that pops", catch(far_return_pop, 0).is_none());
    eq("far return that pops: rsp", 0, SEEN.get()[0]);
    SEEN.set([1; 32]);
    check("32-bit far return", catch(far_return32, 0).is_none());
    eq("32-bit far return: rsp", 0, SEEN.get()[0]);
}

fn call_gates() {
    let door = gate_door as *const () as u64;
    let gate = |selector: u16, kind: u64| {
        cpu::set_descriptor(sel::GATE, trap::gate(door, selector, kind, 0)[0]);
        cpu::set_descriptor(sel::GATE + 8, door >> 32);
    };
    let named = u64::from(sel::GATE);
    gate(sel::CODE, 0xec);
    SEEN.set([0; 32]);
    check("call gate at CPL 0", catch(far_call64, named).is_none());
    let s = SEEN.get();
    eq("call gate at CPL 0: rip", far_call64_at[1], s[0]);
    eq("call gate at CPL 0: cs", sel::CODE.into(), s[1]);
    for (what, run, at) in [
        ("m16:64", far_call64 as unsafe extern "C" fn(u64) -> u64, &far_call64_at),
        ("m16:32", far_call32, &far_call32_at),
    ] {
        SEEN.set([0; 32]);
        let t = trap::user(run, named | 3);
        let s = SEEN.get();
        eq("call gate: came back", DONE, t.frame.vector);
        eq(what, at[1] + USER, s[0]);
        eq("call gate: pushed cs", sel::USER_CODE.into(), s[1]);
        check("call gate: pushed rsp", s[2] > USER && s[2] < trap::stack_top(2) + USER);
        eq("call gate: pushed ss", sel::USER_DATA.into(), s[3]);
        eq("call gate: stack", trap::stack_top(0) - 32, s[4]);
        eq("call gate: cs", sel::CODE.into(), s[5]);
        eq("call gate: ss is null", 0, s[6]);
        eq("call gate: cs after the return", sel::USER_CODE.into(), t.frame.cs);
    }
    let user = |argument| Some(trap::user(far_call64, argument));
    let (at, ucs) = (far_call64_at[0] + USER, sel::USER_CODE);
    gate(sel::CODE, 0x8c);
    expect("call gate: DPL below CPL", user(named | 3), 13, named, at, ucs);
    gate(sel::CODE, 0x6c);
    expect("call gate: absent", user(named | 3), 11, named, at, ucs);
    gate(sel::CODE32, 0xec);
    expect("call gate: to 32-bit code", user(named | 3), 13, sel::CODE32.into(), at, ucs);
    gate(0, 0xec);
    expect("call gate: null target", user(named | 3), 13, 0, at, ucs);
    gate(sel::CODE, 0xec);
    cpu::set_descriptor(sel::GATE + 8, door >> 32 | 0xc << 40);
    expect("call gate: second half has a type", user(named | 3), 13, named, at, ucs);
    cpu::set_descriptor(sel::GATE, 0);
    cpu::set_descriptor(sel::GATE + 8, 0);
    expect("far call to supervisor code", user(8), 13, 8, at, ucs);
}

fn sysenter() {
    let at = &sysenter64_at;
    let stack = trap::stack_top(1);
    cpu::wrmsr(msr::SYSENTER_CS, 8);
    cpu::wrmsr(msr::SYSENTER_ESP, stack);
    cpu::wrmsr(msr::SYSENTER_EIP, sysenter_door as *const () as u64);
    if !cpu::intel() {
        expect(
            "#UD sysenter in long mode (AMD)",
            Some(trap::user(sysenter64, 0)),
            6,
            0,
            at[0] + USER,
            sel::USER_CODE,
        );
        return;
    }
    SEEN.set([0; 32]);
    let t = trap::user(sysenter64, 0);
    let s = SEEN.get();
    eq("sysenter: came back", DONE, t.frame.vector);
    eq("sysenter: rsp", stack, s[0]);
    eq("sysenter: cs", 8, s[1]);
    eq("sysenter: ss", 16, s[2]);
    eq("sysenter: IF", 0, s[3] & 0x200);
    eq("sysexit 64: cs", 0x2b, t.frame.cs);
    eq("sysexit 64: ss", 0x33, t.frame.ss);
    SEEN.set([1; 32]);
    let t = trap::user(sysenter64, 0);
    eq("sysexit 32: came back", DONE, t.frame.vector);
    eq("sysexit 32: cs", 0x1b, t.frame.cs);
    eq("sysexit 32: ss", 0x23, t.frame.ss);
    cpu::wrmsr(msr::SYSENTER_CS, 0);
    expect(
        "#GP sysenter without SYSENTER_CS",
        Some(trap::user(sysenter64, 0)),
        13,
        0,
        at[0] + USER,
        sel::USER_CODE,
    );
}

fn sysret32() {
    cpu::wrmsr(msr::LSTAR, sysret32_door as *const () as u64);
    let t = trap::user(syscall64, 0);
    eq("sysret 32: came back", DONE, t.frame.vector);
    eq("sysret 32: rip", syscall64_at[1] + USER + 2, t.frame.rip);
    eq("sysret 32: cs", 0x1b, t.frame.cs);
    eq("sysret 32: ss", 0x23, t.frame.ss);
}

/// LAR, LSL, VERR, VERW: the value or that ZF was clear.
macro_rules! ask {
    ($name:ident, $text:literal) => {
        fn $name(selector: u16) -> Option<u32> {
            let (value, good): (u32, u8);
            // SAFETY: only looks at a descriptor.
            unsafe {
                core::arch::asm!($text, "setz {1}", out(reg) value, out(reg_byte) good, in("cx") selector, options(nostack));
            }
            (good != 0).then_some(value)
        }
    };
}
ask!(lar, "mov {0:e}, 0; lar {0:e}, cx");
ask!(lsl, "mov {0:e}, 0; lsl {0:e}, cx");
ask!(verr, "mov {0:e}, 0; verr cx");
ask!(verw, "mov {0:e}, 0; verw cx");

fn descriptors() {
    let none = |what: &str, got: Option<u32>| check(what, got.is_none());
    // Bits 16-19 are undefined.
    let rights = |selector| lar(selector).unwrap_or(0) & 0x00f0_ff00;
    eq("lar code", 0x00a0_9b00, rights(sel::CODE));
    eq("lar data", 0x00c0_9300, rights(sel::DATA));
    eq("lar absent", 0x00c0_1300, rights(sel::ABSENT_DATA));
    eq("lar task", 0x8b00, rights(sel::TASK) & 0xff00);
    none("lar null", lar(0));
    none("lar beyond", lar(sel::BEYOND));
    eq("lsl pages", 0xffff_ffff, lsl(sel::DATA).unwrap_or(0));
    cpu::set_descriptor(sel::SPARE, 0x0040_9200_0000_1234);
    eq("lsl bytes", 0x1234, lsl(sel::SPARE).unwrap_or(0));
    none("lsl beyond", lsl(sel::BEYOND));
    check("verr data", verr(sel::DATA).is_some());
    check("verr code", verr(sel::CODE).is_some());
    check("verw data", verw(sel::DATA).is_some());
    none("verw code", verw(sel::CODE));
    none("verr task", verr(sel::TASK));
    none("verr null", verr(0));
    // A base from the descriptor table counts in 64-bit mode for FS and GS alone.
    SEEN.set([0x77; 32]);
    let at = SEEN.addr();
    cpu::set_descriptor(sel::SPARE, 0x0040_9200_0000_0fff | (at & 0xff_ffff) << 16 | (at >> 24 & 0xff) << 56);
    let (fs, ds): (u64, u64);
    // SAFETY: reads SEEN by FS; the base of DS does not count.
    unsafe {
        core::arch::asm!(
            "mov fs, {s:e}", "mov {fs}, fs:[8]", "mov ds, {s:e}", "mov {ds}, [{at}]", "mov ds, {d:e}",
            s = in(reg) u32::from(sel::SPARE), d = in(reg) u32::from(sel::DATA), at = in(reg) at + 16,
            fs = out(reg) fs, ds = out(reg) ds, options(nostack)
        );
    }
    eq("fs base from the table", 0x77, fs);
    eq("ds base does not count", 0x77, ds);
    eq("fs base in its register", at, cpu::rdmsr(msr::FS_BASE));
    cpu::wrmsr(msr::FS_BASE, 0);
    cpu::set_descriptor(sel::SPARE, 0);
}

/// Down to real mode, with stops, and back.
mod real {
    use super::*;

    core::arch::global_asm!(
        r#"
    .text
    .globl real_trip
real_trip:
    pushq %rbx
    pushq %rbp
    movq %rsp, REAL_RSP
    lidt real_idt
    pushq $0x30
    pushq $1f
    lretq
    .code32
    # Paging off, long mode off.
1:  movl %cr0, %eax
    andl $0x7fffffff, %eax
    movl %eax, %cr0
    movl $0xc0000080, %ecx
    rdmsr
    andl $~0x100, %eax
    wrmsr
    movl $0xf000, %edi
    movl $0x1badb002, (%edi)
    # Two-level paging with a 4 MiB page that shows low memory at 4 MiB, and a 4 KiB page at 8 MiB + 5000h.
    movl %cr4, %eax
    andl $~0x20, %eax
    orl $0x10, %eax
    movl %eax, %cr4
    movl REAL_TABLES, %eax
    movl %eax, %cr3
    movl %cr0, %eax
    orl $0x80000000, %eax
    movl %eax, %cr0
    jmp 2f
2:  movl 0x40f000, %eax
    movl %eax, REAL_SEEN
    movl 0x805000, %eax
    movl %eax, REAL_SEEN + 4
    movl $0x600d, 0x805004
    movl %cr0, %eax
    andl $0x7fffffff, %eax
    movl %eax, %cr0
    # Three-level paging: 2 MiB pages, low memory again at 2 GiB.
    movl %cr4, %eax
    orl $0x20, %eax
    movl %eax, %cr4
    movl REAL_TABLES + 4, %eax
    movl %eax, %cr3
    movl %cr0, %eax
    orl $0x80000000, %eax
    movl %eax, %cr0
    jmp 3f
3:  movl 0x8000f000, %eax
    movl %eax, REAL_SEEN + 8
    movl %cr0, %eax
    andl $0x7fffffff, %eax
    movl %eax, %cr0
    # Big data segments stay big in real mode.
    movw $0x10, %ax
    movw %ax, %ds
    ljmp $0x38, $0x9000
    .globl real16
real16:
    .code16
    movw $0x40, %ax
    movw %ax, %es
    movw %ax, %ss
    movw %ax, %fs
    movl %cr0, %eax
    andb $0xfe, %al
    movl %eax, %cr0
    ljmp $0, $(4f - real16 + 0x9000)
4:  xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %ss
    movw %ax, %es
    movw $0x7000, %sp
    # 16-bit segment arithmetic: F00h:0 is F000h.
    movw $0xf00, %ax
    movw %ax, %fs
    movl %fs:0, %eax
    movl %eax, 0xf100
    # Above 1 MiB by a 32-bit address: the limit loaded in protected mode holds.
    movl $0x100000, %ebx
    movl (%ebx), %eax
    movl %eax, 0xf104
    # INT through the vector table at 0, IRET.
    movw $(5f - real16 + 0x9000), 0x180
    movw $0, 0x182
    movw $0, 0xf108
    sti
    int $0x60
    pushf
    popw %ax
    movw %ax, 0xf10c
    cli
    # A divide error pushes the address of the instruction; its handler steps over it.
    movw $(6f - real16 + 0x9000), 0
    movw $0, 2
    xorw %dx, %dx
    movw $7, %ax
    xorw %cx, %cx
7:  divw %cx
    movw %cx, 0xf110
    subw $(7b - real16 + 0x9000), 0xf112
    # Far call and return.
    movw %sp, %bx
    lcall $0x900, $(8f - real16)
    subw %sp, %bx
    movw %bx, 0xf116
    # PUSH SP stores the old value; PUSHA and POPA; ENTER and LEAVE.
    movw %sp, %bx
    pushw %sp
    popw %ax
    subw %ax, %bx
    movw %bx, 0xf118
    movw $0x5555, %di
    pushaw
    xorw %di, %di
    popaw
    movw %di, 0xf11a
    movw %sp, %bx
    enter $16, $0
    movw %bx, %cx
    subw %sp, %cx
    movw %cx, 0xf11c
    leave
    subw %sp, %bx
    movw %bx, 0xf11e
    # String moves with 16-bit registers, backwards, over a segment override.
    movl $0x44332211, 0xf200
    movw $0xf203, %si
    movw $0xf213, %di
    movl $0x00010004, %ecx
    std
    rep movsb
    cld
    movl 0xf210, %eax
    movl %eax, 0xf120
    movw %cx, 0xf124
    # 16-bit addresses wrap in the segment.
    movb $0x5a, 0xf300
    movw $0xff00, %bx
    movw $0xf400, %si
    movb (%bx,%si), %al
    movb %al, 0xf126
    # The stack pointer wraps: the word goes to FFFEh.
    movw %sp, %bx
    xorw %sp, %sp
    pushw $0x7788
    movw %sp, %ax
    movw %bx, %sp
    movw %ax, 0xf128
    movw 0xfffe, %ax
    movw %ax, 0xf12a
    # LOOP counts CX, the addresses after a jump are 16 bits wide.
    movl $0x20003, %ecx
    xorw %ax, %ax
9:  incw %ax
    loop 9b
    movw %ax, 0xf12c
    # XLAT, LES.
    movw $0xf200, %bx
    movb $2, %al
    xlatb
    movb %al, 0xf12e
    movl $0x12345678, 0xf400
    lesw 0xf400, %di
    movw %di, 0xf130
    movw %es, %ax
    movw %ax, 0xf132
    # IMUL, 32-bit arithmetic by prefix.
    movl $0x10000, %eax
    imull $0x1234, %eax, %eax
    movl %eax, 0xf134
    smsww %ax
    movw %ax, 0xf138
    # Back: protected mode, long mode.
    movl %cr0, %eax
    orb $1, %al
    movl %eax, %cr0
    ljmpl $0x30, $2f
5:  movw $0x6006, %cs:0xf108
    pushf
    popw %cs:0xf10a
    iretw
6:  movw $0xdead, %cx
    pushw %bp
    movw %sp, %bp
    movw 2(%bp), %ax
    movw %ax, %cs:0xf112
    addw $2, 2(%bp)
    popw %bp
    iretw
8:  movw %cs, %ax
    movw %ax, %ss:0xf114
    lretw
    .globl real16_end
real16_end:
    .code32
2:  movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl REAL_RSP, %esp
    call kit_long_mode
    ljmp $8, $3f
    .code64
3:  movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs
    movq REAL_RSP, %rsp
    popq %rbp
    popq %rbx
    ret
    .balign 8
real_idt:
    .word 0x3ff
    .quad 0
"#,
        options(att_syntax)
    );
    unsafe extern "C" {
        fn real_trip();
        static real16: u8;
        static real16_end: u8;
    }
    #[unsafe(no_mangle)]
    static REAL_RSP: Global<u64> = Global::new(0);
    #[unsafe(no_mangle)]
    static REAL_TABLES: Global<[u32; 2]> = Global::new([0; 2]);
    #[unsafe(no_mangle)]
    static REAL_SEEN: Global<[u32; 4]> = Global::new([0; 4]);

    fn word(at: u64) -> u64 {
        // SAFETY: low memory.
        u64::from(unsafe { (at as *const u16).read_volatile() })
    }
    fn long(at: u64) -> u64 {
        // SAFETY: low memory.
        u64::from(unsafe { (at as *const u32).read_volatile() })
    }

    pub fn test() {
        let [directory, table, frame, pointers, directory3] = [0; 5].map(|_| page::fresh());
        // SAFETY: fresh pages below 4 GiB.
        unsafe {
            let d = directory as *mut u32;
            *d = 0x83;
            *d.add(1) = 0x83;
            *d.add(2) = table as u32 | 3;
            *(table as *mut u32).add(5) = frame as u32 | 3;
            *(frame as *mut u32) = 0xfeed;
            REAL_TABLES.set([directory as u32, pointers as u32]);
            let p = pointers as *mut u64;
            *p = directory3 | 1;
            *p.add(2) = directory3 | 1;
            for i in 0..8 {
                *(directory3 as *mut u64).add(i) = (i as u64) << 21 | 0x83;
            }
            let from = &raw const real16;
            let len = (&raw const real16_end).offset_from(from) as usize;
            core::ptr::copy_nonoverlapping(from, 0x9000 as *mut u8, len);
            (0xf100 as *mut u8).write_bytes(0xee, 0x100);
            real_trip();
        }
        trap::load_idt(0xfff);
        let [small, page4k, pae, _] = REAL_SEEN.get();
        eq("two-level paging: 4 MiB page", 0x1bad_b002, small);
        eq("two-level paging: 4 KiB page", 0xfeed, page4k);
        // SAFETY: the frame is the test's own.
        unsafe {
            eq("two-level paging: store", 0x600d, *(frame as *const u32).add(1));
            eq("two-level paging: accessed and dirty", 0x60, *(table as *const u32).add(5) & 0x60);
            eq("two-level paging: accessed alone above", 0x20, *(directory as *const u32).add(2) & 0x60);
        }
        eq("three-level paging: 2 MiB page", 0x1bad_b002, pae);
        // SAFETY: the image's first bytes.
        let image = unsafe { (0x10_0000 as *const u32).read_volatile() };
        for (what, got, expected) in [
            ("real: segment times 16", long(0xf100), 0x1bad_b002),
            ("real: big segment", long(0xf104), image.into()),
            ("real: int", word(0xf108), 0x6006),
            ("real: int clears IF", word(0xf10a) & 0x200, 0),
            ("real: iret sets IF", word(0xf10c) & 0x200, 0x200),
            ("real: divide error", word(0xf110), 0xdead),
            ("real: divide error's address", word(0xf112), 0),
            ("real: far call's cs", word(0xf114), 0x900),
            ("real: far return", word(0xf116), 0),
            ("real: push sp", word(0xf118), 0),
            ("real: popa", word(0xf11a), 0x5555),
            ("real: enter", word(0xf11c), 18),
            ("real: leave", word(0xf11e), 0),
            ("real: rep movsb backwards", long(0xf120), 0x4433_2211),
            ("real: rep counts cx", word(0xf124), 0),
            ("real: address wraps", word(0xf126) & 0xff, 0x5a),
            ("real: sp wraps", word(0xf128), 0xfffe),
            ("real: word at the top", word(0xf12a), 0x7788),
            ("real: loop counts cx", word(0xf12c), 3),
            ("real: xlat", word(0xf12e) & 0xff, 0x33),
            ("real: les offset", word(0xf130), 0x5678),
            ("real: les segment", word(0xf132), 0x1234),
            ("real: 32-bit imul", long(0xf134), 0x1234_0000),
            ("real: smsw without PE", word(0xf138) & 1, 0),
        ] {
            eq(what, expected, got);
        }
    }
}
