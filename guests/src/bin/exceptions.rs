//! Provokes every exception that a 64-bit guest can, and looks at vector, error code, CR2, pushed RIP, stack
//! and flags (Intel SDM vol. 3A, chapters 7 and 18).
#![no_std]
#![no_main]

use kit::cpu::{self, msr, selector as sel};
use kit::page::{self, D, LARGE, NX, P, TEST, U, W};
use kit::trap::{self, DONE, Trap, catch, user};
use kit::{USER, check, eq, report, snippet};

kit::guest!(main);

type Snippet = unsafe extern "C" fn(u64) -> u64;

// ---- what is provoked -------------------------------------------------------------------------------

snippet!(div0, div0_at, "xor eax, eax; xor edx, edx; xor ecx, ecx", "div ecx");
snippet!(idiv_over, idiv_over_at, "mov eax, 0x80000000; cdq; mov ecx, -1", "idiv ecx");
snippet!(div8_over, div8_over_at, "mov eax, 0x1234; mov cl, 0x12", "div cl");
snippet!(div64_over, div64_over_at, "mov rdx, 5; xor eax, eax; mov rcx, 5", "div rcx");
snippet!(int3, int3_at, "", "int3");
snippet!(int_3, int_3_at, "", ".byte 0xcd, 3");
snippet!(int41, int41_at, "", "int 0x41");
snippet!(icebp, icebp_at, "", ".byte 0xf1");
snippet!(ud2, ud2_at, "", "ud2");
snippet!(ud_into, ud_into_at, "", ".byte 0xce");
snippet!(ud_push_es, ud_push_es_at, "", ".byte 0x06");
snippet!(ud_lock_load, ud_lock_load_at, "", ".byte 0xf0, 0x48, 0x8b, 0x07");
snippet!(ud_mov_cs, ud_mov_cs_at, "", ".byte 0x8e, 0xc8");
snippet!(ud_lea_reg, ud_lea_reg_at, "", ".byte 0x8d, 0xc0");
snippet!(ud_syscall, ud_syscall_at, "", "syscall");
snippet!(load, load_at, "", "mov rax, [rdi]");
snippet!(store, store_at, "xor eax, eax", "mov [rdi], rax");
snippet!(add_memory, add_memory_at, "", "add qword ptr [rdi], 1");
snippet!(load32, load32_at, "", "mov eax, [rdi]");
snippet!(load_rbp, load_rbp_at, "mov rbp, rdi", "mov rax, [rbp]");
snippet!(pop_noncanonical, pop_noncanonical_at, "mov rsp, rdi", "pop rax");
snippet!(call_it, call_it_at, "", "call rdi");
snippet!(jump_it, jump_it_at, "", "jmp rdi");
snippet!(mov_ds, mov_ds_at, "", "mov ds, edi");
snippet!(mov_ss, mov_ss_at, "", "mov ss, edi");
snippet!(lldt, lldt_at, "", "lldt di");
snippet!(ltr, ltr_at, "", "ltr di");
snippet!(far_return, far_return_at, "push rdi; lea rax, [rip + 98f]; push rax", "retfq");
snippet!(far_noncanonical, far_noncanonical_at, "push 8; push rdi", "retfq");
snippet!(
    iret,
    iret_at,
    "push [rdi + 32]; push [rdi + 24]; push [rdi + 16]; push [rdi + 8]; push [rdi]",
    "iretq"
);
snippet!(iret_nt, iret_nt_at, "pushfq; or qword ptr [rsp], 0x4000; popfq", "iretq");
snippet!(to_cr0, to_cr0_at, "", "mov cr0, rdi");
snippet!(to_cr3, to_cr3_at, "", "mov cr3, rdi");
snippet!(to_cr4, to_cr4_at, "", "mov cr4, rdi");
snippet!(to_cr8, to_cr8_at, "", "mov cr8, rdi");
snippet!(to_dr7, to_dr7_at, "", "mov dr7, rdi");
snippet!(to_dr4, to_dr4_at, "", ".byte 0x0f, 0x23, 0xe7");
snippet!(from_dr0, from_dr0_at, "", "mov rax, dr0");
snippet!(out_port, out_port_at, "mov edx, edi; xor eax, eax", "out dx, al");
snippet!(out_port32, out_port32_at, "mov edx, edi; xor eax, eax", "out dx, eax");
snippet!(in_port, in_port_at, "mov edx, edi", "in al, dx");
snippet!(rep_out, rep_out_at, "mov edx, edi; lea rsi, [rip + 2f]; mov ecx, 3; 2:", "rep outsb");
snippet!(write_efer, write_efer_at, "mov rax, rdi; xor edx, edx; mov ecx, 0xc0000080", "wrmsr");
snippet!(
    write_lstar,
    write_lstar_at,
    "mov eax, edi; shr rdi, 32; mov edx, edi; mov ecx, 0xc0000082",
    "wrmsr"
);
snippet!(write_gs, write_gs_at, "mov eax, edi; shr rdi, 32; mov edx, edi; mov ecx, 0xc0000101", "wrmsr");
snippet!(write_pat, write_pat_at, "mov eax, edi; xor edx, edx; mov ecx, 0x277", "wrmsr");
snippet!(write_unknown, write_unknown_at, "mov ecx, 0x7fff1234; xor eax, eax; xor edx, edx", "wrmsr");
snippet!(read_unknown, read_unknown_at, "mov ecx, 0x7fff1234", "rdmsr");
snippet!(xsetbv, xsetbv_at, "xor ecx, ecx; xor edx, edx; mov eax, edi", "xsetbv");
snippet!(step, step_at, "pushfq; or qword ptr [rsp], 0x100; popfq", "nop", "nop");
snippet!(
    step_rep,
    step_rep_at,
    "mov rsi, rdi; mov ecx, 3; pushfq; or qword ptr [rsp], 0x100; popfq",
    "rep movsb"
);
snippet!(
    step_ss,
    step_ss_at,
    "mov eax, ss; pushfq; or qword ptr [rsp], 0x100; popfq; mov ss, eax",
    "nop",
    "nop"
);
snippet!(fpu, fpu_at, "", "fld1", "fstp st(0)");
snippet!(sse, sse_at, "", "movaps xmm0, xmm1");
snippet!(sse_off, sse_off_at, "mov cr4, rdi", "movaps xmm0, xmm1");
snippet!(quiet, quiet_at, "", "nop");

macro_rules! user_only {
    ($($name:ident, $at:ident, $text:literal;)*) => {
        $(snippet!($name, $at, "mov rax, rsp", $text);)*
        /// Instructions that need CPL 0.
        const PRIVILEGED: &[(&str, Snippet, &[u64; 2])] = &[$(($text, $name as Snippet, &$at)),*];
    };
}
user_only! {
    u_hlt, u_hlt_at, "hlt";
    u_cli, u_cli_at, "cli";
    u_sti, u_sti_at, "sti";
    u_in, u_in_at, "in al, 0x70";
    u_out, u_out_at, "out 0x70, al";
    u_outsb, u_outsb_at, "outsb";
    u_lgdt, u_lgdt_at, "lgdt [rax]";
    u_lidt, u_lidt_at, "lidt [rax]";
    u_lldt, u_lldt_at, "lldt ax";
    u_ltr, u_ltr_at, "ltr ax";
    u_from_cr0, u_from_cr0_at, "mov rax, cr0";
    u_to_cr3, u_to_cr3_at, "mov cr3, rax";
    u_from_dr7, u_from_dr7_at, "mov rax, dr7";
    u_rdmsr, u_rdmsr_at, "rdmsr";
    u_wrmsr, u_wrmsr_at, "wrmsr";
    u_invlpg, u_invlpg_at, "invlpg [rax]";
    u_clts, u_clts_at, "clts";
    u_lmsw, u_lmsw_at, "lmsw ax";
    u_swapgs, u_swapgs_at, "swapgs";
    u_wbinvd, u_wbinvd_at, "wbinvd";
    u_invd, u_invd_at, "invd";
    u_sysret, u_sysret_at, "sysretq";
}
snippet!(u_rdtsc, u_rdtsc_at, "", "rdtsc");
snippet!(u_sgdt, u_sgdt_at, "", "sgdt [rsp - 64]");
snippet!(u_smsw, u_smsw_at, "", "smsw ax");
snippet!(u_out80, u_out80_at, "", "out 0x80, al");
snippet!(u_out80w, u_out80w_at, "", "out 0x80, eax");
snippet!(u_syscall, u_syscall_at, "stc; std; mov r10, rsp", "syscall");
snippet!(u_unaligned, u_unaligned_at, "lea rdi, [rsp - 63]", "mov eax, [rdi]");
snippet!(u_popf, u_popf_at, "push 0x3202", "popfq");

core::arch::global_asm!(
    r#"
syscall_door:
    mov [SEEN], rcx
    mov [SEEN + 8], r11
    mov [SEEN + 16], rsp
    mov rax, cs
    mov [SEEN + 24], rax
    mov rax, ss
    mov [SEEN + 32], rax
    pushfq
    pop rax
    mov [SEEN + 40], rax
    sysretq
"#
);
unsafe extern "C" {
    fn syscall_door();
}
#[unsafe(no_mangle)]
static SEEN: kit::Global<[u64; 6]> = kit::Global::new([0; 6]);

// ---- looking ----------------------------------------------------------------------------------------

/// Where the pushed RIP should be.
#[derive(Clone, Copy)]
enum Rip<'a> {
    /// At the instruction (a fault).
    At(&'a [u64; 2]),
    /// Behind it (a trap).
    Behind(&'a [u64; 2]),
    Is(u64),
}
use Rip::{At, Behind, Is};

const NO_ERROR: u64 = 0;

/// Compares a trap with what it should be; prints one line.
fn expect(
    what: &str,
    trap: Option<Trap>,
    vector: u64,
    error: u64,
    rip: Rip,
    cr2: Option<u64>,
    from_user: bool,
) {
    let Some(t) = trap else {
        report::fail(what, format_args!("expected vector {vector} got nothing"));
        return;
    };
    let f = &t.frame;
    let shift = if from_user { USER } else { 0 };
    let rip = match rip {
        At(at) => at[0] + shift,
        Behind(at) => at[1] + shift,
        Is(value) => value,
    };
    let cs = if from_user { sel::USER_CODE } else { sel::CODE };
    let same = f.vector == vector
        && f.error == error
        && f.rip == rip
        && f.cs == u64::from(cs)
        && cr2.is_none_or(|a| a == t.cr2);
    if same {
        report::pass(what);
    } else {
        report::fail(
            what,
            format_args!(
                "expected vector {vector} error {error:#x} rip {rip:#x} cs {cs:#x} cr2 {:#x}, got vector {} error \
                 {:#x} rip {:#x} cs {:#x} cr2 {:#x}",
                cr2.unwrap_or(0),
                f.vector,
                f.error,
                f.rip,
                f.cs,
                t.cr2
            ),
        );
    }
}

/// Checks after which TCG does not go on: it enters another mode, or repeats the instruction for ever.
const TCG_BREAKS: &[&str] = &[
    "#GP CR0 PG without PE",
    "#GP CR4 reserved bit",
    "#GP CR4 without PAE in long mode",
    "#GP CR3 reserved bit",
    "#GP ltr null",
];
/// Checks that TCG fails, and goes on. The manuals are clear about each.
const TCG_FAILS: &[&str] = &[
    "#DB int1",
    "#UD lock on a load",
    "#GP store non-canonical",
    "#SS load non-canonical by rbp",
    "#SS pop non-canonical",
    "#GP jump non-canonical",
    "#GP call non-canonical",
    "#GP CR0 NW without CD",
    "#GP CR0 reserved high bit",
    "#GP CR8 above 15",
    "#GP EFER.LME off while paging",
    "#GP EFER reserved bit",
    "#GP LSTAR non-canonical",
    "#GP GS base non-canonical",
    "#GP PAT with type 2",
    "#GP wrmsr unknown",
    "#GP rdmsr unknown",
    "#GP ss null with RPL 3",
    "#GP far return non-canonical",
    "#GP iret non-canonical",
    "#NP gate absent",
    "#GP gate of no kind",
    "#GP task gate in long mode",
    "#GP vector beyond the IDT",
    "#NP while delivering #UD, EXT set",
    "#PF reserved bit, read",
    "#PF reserved bit, write",
    "#PF reserved bit, fetch",
    "#PF reserved bit of a 2 MiB page",
    "#PF user meets reserved bit",
    "#PF NX bit is reserved without NXE",
    "#DB general detect",
    "DR6.BD",
    "user int 41h",
    "#AC",
    "syscall: SFMASK clears DF alone",
    "faults push RF",
];

fn kernel(what: &str, run: Snippet, argument: u64, vector: u64, error: u64, rip: Rip) {
    if report::tcg() && TCG_BREAKS.contains(&what) {
        report::skip(what, "TCG does not survive it");
        return;
    }
    expect(what, catch(run, argument), vector, error, rip, None, false);
}

fn fault(what: &str, run: Snippet, at: u64, error: u64, rip: Rip) {
    expect(what, catch(run, at), 14, error, rip, Some(at), false);
}

fn user_fault(what: &str, run: Snippet, at: u64, error: u64, rip: Rip) {
    expect(what, Some(user(run, at)), 14, error, rip, Some(at), true);
}

fn main() {
    report::tcg_fails(TCG_FAILS);
    simple();
    general_protection();
    segments_and_gates();
    page_faults();
    debug();
    from_user();
    system_calls();
    double_faults();
    flags_and_stack();
}

fn simple() {
    kernel("#DE by zero", div0, 0, 0, NO_ERROR, At(&div0_at));
    kernel("#DE idiv overflow", idiv_over, 0, 0, NO_ERROR, At(&idiv_over_at));
    kernel("#DE 8-bit overflow", div8_over, 0, 0, NO_ERROR, At(&div8_over_at));
    kernel("#DE 64-bit overflow", div64_over, 0, 0, NO_ERROR, At(&div64_over_at));
    kernel("#BP int3", int3, 0, 3, NO_ERROR, Behind(&int3_at));
    kernel("#BP int 3", int_3, 0, 3, NO_ERROR, Behind(&int_3_at));
    kernel("int 41h", int41, 0, 0x41, NO_ERROR, Behind(&int41_at));
    kernel("#DB int1", icebp, 0, 1, NO_ERROR, Behind(&icebp_at));
    kernel("#UD ud2", ud2, 0, 6, NO_ERROR, At(&ud2_at));
    kernel("#UD into in 64-bit mode", ud_into, 0, 6, NO_ERROR, At(&ud_into_at));
    kernel("#UD push es in 64-bit mode", ud_push_es, 0, 6, NO_ERROR, At(&ud_push_es_at));
    kernel("#UD lock on a load", ud_lock_load, kit::trap::TSS.addr(), 6, NO_ERROR, At(&ud_lock_load_at));
    kernel("#UD mov cs", ud_mov_cs, 0, 6, NO_ERROR, At(&ud_mov_cs_at));
    kernel("#UD lea of a register", ud_lea_reg, 0, 6, NO_ERROR, At(&ud_lea_reg_at));
    let efer = cpu::rdmsr(msr::EFER);
    cpu::wrmsr(msr::EFER, efer & !1);
    kernel("#UD syscall without EFER.SCE", ud_syscall, 0, 6, NO_ERROR, At(&ud_syscall_at));
    cpu::wrmsr(msr::EFER, efer);
    let cr0 = cpu::cr0();
    let with = |what: &str, run: Snippet, cr0: u64, vector: u64, at: &[u64; 2]| {
        expect(what, trap::catch_with(run, 0, cr0), vector, NO_ERROR, At(at), None, false);
    };
    with("#NM x87 with CR0.TS", fpu, cr0 | 8, 7, &fpu_at);
    with("#NM SSE with CR0.TS", sse, cr0 | 8, 7, &sse_at);
    with("#UD SSE with CR0.EM", sse, cr0 | 4, 6, &sse_at);
    with("#NM x87 with CR0.EM", fpu, cr0 | 4, 7, &fpu_at);
    let cr4 = cpu::cr4();
    let t = catch(sse_off, cr4 & !0x200);
    cpu::set_cr4(cr4);
    expect("#UD SSE without CR4.OSFXSR", t, 6, NO_ERROR, At(&sse_off_at), None, false);
}

fn general_protection() {
    let hole = 0x8000_0000_0000;
    kernel("#GP load non-canonical", load, hole, 13, 0, At(&load_at));
    kernel("#GP store non-canonical", store, 0x7fff_ffff_fff9, 13, 0, At(&store_at));
    kernel("#SS load non-canonical by rbp", load_rbp, hole, 12, 0, At(&load_rbp_at));
    kernel("#SS pop non-canonical", pop_noncanonical, hole, 12, 0, At(&pop_noncanonical_at));
    kernel("#GP jump non-canonical", jump_it, hole, 13, 0, At(&jump_it_at));
    kernel("#GP call non-canonical", call_it, hole, 13, 0, At(&call_it_at));
    let cr0 = cpu::cr0();
    kernel("#GP CR0 PG without PE", to_cr0, cr0 & !1, 13, 0, At(&to_cr0_at));
    kernel("#GP CR0 NW without CD", to_cr0, cr0 & !(1 << 30) | 1 << 29, 13, 0, At(&to_cr0_at));
    kernel("#GP CR0 reserved high bit", to_cr0, cr0 | 1 << 40, 13, 0, At(&to_cr0_at));
    cpu::set_cr0(cr0);
    let cr4 = cpu::cr4();
    kernel("#GP CR4 reserved bit", to_cr4, cr4 | 1 << 40, 13, 0, At(&to_cr4_at));
    kernel("#GP CR4 without PAE in long mode", to_cr4, cr4 & !0x20, 13, 0, At(&to_cr4_at));
    kernel("#GP CR3 reserved bit", to_cr3, cpu::cr3() | 1 << 55, 13, 0, At(&to_cr3_at));
    kernel("#GP CR8 above 15", to_cr8, 16, 13, 0, At(&to_cr8_at));
    kernel("#GP DR7 high bits", to_dr7, 0x1_0000_0400, 13, 0, At(&to_dr7_at));
    cpu::set_cr4(cr4 | 8);
    kernel("#UD DR4 with CR4.DE", to_dr4, 0, 6, NO_ERROR, At(&to_dr4_at));
    cpu::set_cr4(cr4);
    let efer = cpu::rdmsr(msr::EFER);
    kernel("#GP EFER.LME off while paging", write_efer, efer & !0x100, 13, 0, At(&write_efer_at));
    kernel("#GP EFER reserved bit", write_efer, efer | 2, 13, 0, At(&write_efer_at));
    kernel("#GP LSTAR non-canonical", write_lstar, hole, 13, 0, At(&write_lstar_at));
    kernel("#GP GS base non-canonical", write_gs, hole, 13, 0, At(&write_gs_at));
    kernel("#GP PAT with type 2", write_pat, 0x0200_0006, 13, 0, At(&write_pat_at));
    kernel("#GP wrmsr unknown", write_unknown, 0, 13, 0, At(&write_unknown_at));
    kernel("#GP rdmsr unknown", read_unknown, 0, 13, 0, At(&read_unknown_at));
    if cpu::cpuid(1, 0)[2] & 1 << 26 != 0 {
        kernel("#UD xsetbv without CR4.OSXSAVE", xsetbv, 1, 6, NO_ERROR, At(&xsetbv_at));
        cpu::set_cr4(cr4 | 1 << 18);
        kernel("#GP XCR0 without x87", xsetbv, 2, 13, 0, At(&xsetbv_at));
        kernel("#GP XCR0 AVX without SSE", xsetbv, 5, 13, 0, At(&xsetbv_at));
        cpu::set_cr4(cr4);
    } else {
        report::skip("XCR0", "the processor has no XSAVE");
    }
}

fn segments_and_gates() {
    let beyond = u64::from(sel::BEYOND);
    kernel("#GP ds beyond the GDT", mov_ds, beyond, 13, beyond, At(&mov_ds_at));
    kernel("#GP ds beyond the GDT, RPL not in the code", mov_ds, beyond | 3, 13, beyond, At(&mov_ds_at));
    kernel("#GP ds from an LDT that is not there", mov_ds, 0xc, 13, 0xc, At(&mov_ds_at));
    kernel("#GP ds of a system segment", mov_ds, sel::TASK.into(), 13, sel::TASK.into(), At(&mov_ds_at));
    kernel("#NP ds absent", mov_ds, sel::ABSENT_DATA.into(), 11, sel::ABSENT_DATA.into(), At(&mov_ds_at));
    kernel("#GP ds RPL above DPL", mov_ds, u64::from(sel::DATA) | 3, 13, sel::DATA.into(), At(&mov_ds_at));
    check("ds null", catch(mov_ds, 0).is_none());
    check("ss null at CPL 0", catch(mov_ss, 0).is_none());
    check("ss data", catch(mov_ss, sel::DATA.into()).is_none());
    kernel("#GP ss null with RPL 3", mov_ss, 3, 13, 0, At(&mov_ss_at));
    kernel("#GP ss of code", mov_ss, sel::CODE.into(), 13, sel::CODE.into(), At(&mov_ss_at));
    kernel("#SS ss absent", mov_ss, sel::ABSENT_DATA.into(), 12, sel::ABSENT_DATA.into(), At(&mov_ss_at));
    kernel("#GP lldt of data", lldt, sel::DATA.into(), 13, sel::DATA.into(), At(&lldt_at));
    let spare = u64::from(sel::SPARE);
    cpu::set_descriptor(sel::SPARE, 0x0000_0200_0000_0fff);
    kernel("#NP lldt absent", lldt, spare, 11, spare, At(&lldt_at));
    cpu::set_descriptor(sel::SPARE, 0);
    check("lldt null", catch(lldt, 0).is_none());
    kernel("#GP ltr null", ltr, 0, 13, 0, At(&ltr_at));
    kernel("#GP ltr busy", ltr, sel::TASK.into(), 13, sel::TASK.into(), At(&ltr_at));
    let absent = u64::from(sel::ABSENT_CODE);
    kernel("#NP far return", far_return, absent, 11, absent, At(&far_return_at));
    kernel("#GP far return to data", far_return, sel::DATA.into(), 13, sel::DATA.into(), At(&far_return_at));
    kernel("#GP far return to null", far_return, 0, 13, 0, At(&far_return_at));
    check("far return", catch(far_return, sel::CODE.into()).is_none());
    kernel(
        "#GP far return non-canonical",
        far_noncanonical,
        0x8000_0000_0000,
        13,
        0,
        At(&far_noncanonical_at),
    );

    let (kcs, kss, ucs, uss) =
        (u64::from(sel::CODE), u64::from(sel::DATA), u64::from(sel::USER_CODE), u64::from(sel::USER_DATA));
    for (what, frame, vector, error) in [
        ("#GP iret to null cs", [quiet_at[0], 0, 2, 0x1000, kss], 13, 0),
        ("#GP iret to data", [quiet_at[0], kss, 2, 0x1000, kss], 13, kss),
        ("#NP iret to absent cs", [quiet_at[0], absent, 2, 0x1000, kss], 11, absent),
        ("#GP iret beyond the GDT", [quiet_at[0], beyond, 2, 0x1000, kss], 13, beyond),
        ("#GP iret non-canonical", [0x8000_0000_0000, kcs, 2, 0x1000, kss], 13, 0),
        ("#GP iret to user with null ss", [quiet_at[0], ucs, 2, 0x1000, 0], 13, 0),
        ("#GP iret to user with code ss", [quiet_at[0], ucs, 2, 0x1000, ucs], 13, ucs & !3),
        ("#GP iret to user with RPL 0 ss", [quiet_at[0], ucs, 2, 0x1000, kss], 13, kss),
        ("#GP iret to user cs by RPL 0", [quiet_at[0], ucs & !3, 2, 0x1000, uss], 13, ucs & !3),
    ] {
        kernel(what, iret, frame.as_ptr() as u64, vector, error, At(&iret_at));
    }
    kernel("#GP iret with NT in 64-bit mode", iret_nt, 0, 13, 0, At(&iret_nt_at));

    // Gates. The error code names vector 41h by index with the IDT bit.
    let named = 0x41 * 8 + 2;
    let stub = trap::gate_to(0x41);
    let to = stub[0] & 0xffff | stub[0] >> 32 & 0xffff_0000 | stub[1] << 32;
    let with = |selector: u16, kind: u64| trap::set_gate(0x41, trap::gate(to, selector, kind, 0));
    with(sel::CODE, 0x0e);
    kernel("#NP gate absent", int41, 0, 11, named, At(&int41_at));
    with(sel::CODE, 0x80);
    kernel("#GP gate of no kind", int41, 0, 13, named, At(&int41_at));
    with(sel::CODE, 0x85);
    kernel("#GP task gate in long mode", int41, 0, 13, named, At(&int41_at));
    with(0, 0x8e);
    kernel("#GP gate with null selector", int41, 0, 13, 0, At(&int41_at));
    with(sel::DATA, 0x8e);
    kernel("#GP gate with data selector", int41, 0, 13, kss, At(&int41_at));
    with(sel::CODE32, 0x8e);
    kernel("#GP gate to 32-bit code", int41, 0, 13, sel::CODE32.into(), At(&int41_at));
    with(sel::ABSENT_CODE, 0x8e);
    kernel("#NP gate to absent code", int41, 0, 11, absent, At(&int41_at));
    with(sel::CODE, 0x8e);
    trap::load_idt(0x41 * 16 - 1);
    kernel("#GP vector beyond the IDT", int41, 0, 13, named, At(&int41_at));
    trap::load_idt(0xfff);
    kernel("int 41h again", int41, 0, 0x41, NO_ERROR, Behind(&int41_at));
    // An exception that meets an absent gate has EXT in the code.
    let gate = trap::gate_to(6);
    trap::set_gate(6, [gate[0] & !(0x80 << 40), gate[1]]);
    kernel("#NP while delivering #UD, EXT set", ud2, 0, 11, 6 * 8 + 3, At(&ud2_at));
    trap::set_gate(6, gate);
}

fn page_faults() {
    let frame = page::fresh();
    // Every page of the test shows the same frame: returns to be called, but for what stores leave at its ends.
    // SAFETY: the page is the test's own.
    unsafe { (frame as *mut u8).write_bytes(0xc3, 4096) };
    let pages = [
        (0x1000, P),
        (0x2000, P | W),
        (0x3000, P | W | U),
        (0x4000, P | U),
        (0x6000, P | W | NX),
        (0x7000, P | W | U | NX),
        (0x8000, P | W | 1 << 51),
        (0xa000, P | W | U | D),
    ];
    for (at, flags) in pages {
        page::map(TEST + at, 1, frame | flags);
    }
    page::map(TEST + (1 << 21), 2, P | W | LARGE | 1 << 13);
    let [ro, rw, urw, uro, none, nx, unx, odd] =
        [0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000, 0x7000, 0x8000].map(|a| TEST + a);

    fault("#PF read absent", load, none + 8, 0, At(&load_at));
    fault("#PF write absent", store, none + 16, 2, At(&store_at));
    fault("#PF fetch absent", call_it, none + 64, 0x10, Is(none + 64));
    fault("#PF write read-only", store, ro + 0xff8, 3, At(&store_at));
    fault("#PF add to read-only", add_memory, ro, 3, At(&add_memory_at));
    fault("#PF fetch NX", call_it, nx + 64, 0x11, Is(nx + 64));
    let reserved = cpu::cpuid(0x8000_0008, 0)[0] & 0xff < 52;
    if reserved {
        fault("#PF reserved bit, read", load, odd, 9, At(&load_at));
        fault("#PF reserved bit, write", store, odd, 0xb, At(&store_at));
        fault("#PF reserved bit, fetch", call_it, odd + 64, 0x19, Is(odd + 64));
    } else {
        report::skip("#PF reserved address bit", "physical addresses have 52 bits");
    }
    fault("#PF reserved bit of a 2 MiB page", load, TEST + (1 << 21) + 5, 9, At(&load_at));
    fault("#PF absent directory", load, TEST + (7 << 30), 0, At(&load_at));
    expect("#PF second page of a load", catch(load, none - 3), 14, 0, At(&load_at), Some(none), false);
    expect("#PF second page of a store", catch(store, none - 1), 14, 3, At(&store_at), Some(none - 1), false);
    page::map(uro, 1, frame | P | W | U);
    expect(
        "#PF second page of a store to good",
        catch(store, none - 1),
        14,
        2,
        At(&store_at),
        Some(none),
        false,
    );
    page::map(uro, 1, frame | P | U);
    check("read read-only", catch(load, ro).is_none());
    check("write writable", catch(store, rw).is_none());
    check("call a page", catch(call_it, rw + 64).is_none());
    let cr0 = cpu::cr0();
    cpu::set_cr0(cr0 & !(1 << 16));
    check("write read-only without CR0.WP", catch(store, ro).is_none());
    check("write read-only user page without CR0.WP", catch(store, uro).is_none());
    cpu::set_cr0(cr0);
    fault("#PF write read-only user page", store, uro, 3, At(&store_at));

    user_fault("#PF user reads absent", load, none, 4, At(&load_at));
    user_fault("#PF user writes absent", store, none, 6, At(&store_at));
    user_fault("#PF user fetches absent", jump_it, none + 64, 0x14, Is(none + 64));
    user_fault("#PF user reads supervisor", load, rw, 5, At(&load_at));
    user_fault("#PF user writes supervisor", store, rw, 7, At(&store_at));
    user_fault("#PF user writes read-only", store, uro, 7, At(&store_at));
    user_fault("#PF user fetches supervisor", jump_it, rw + 64, 0x15, Is(rw + 64));
    user_fault("#PF user fetches NX", jump_it, unx + 64, 0x15, Is(unx + 64));
    if reserved {
        user_fault("#PF user meets reserved bit", load, odd, 0xd, At(&load_at));
    }
    eq("user reads", DONE, user(load, uro).frame.vector);
    eq("user writes", DONE, user(store, urw + 8).frame.vector);
    eq("user calls", DONE, user(call_it, TEST + 0xa000 + 100).frame.vector);

    let features = cpu::cpuid(7, 0)[1];
    let cr4 = cpu::cr4();
    if features & 1 << 7 != 0 {
        cpu::set_cr4(cr4 | 1 << 20);
        fault("#PF SMEP", call_it, urw + 64, 0x11, Is(urw + 64));
        check("SMEP leaves supervisor pages", catch(call_it, rw + 64).is_none());
        cpu::set_cr4(cr4);
        check("no SMEP", catch(call_it, urw + 64).is_none());
    } else {
        report::skip("SMEP", "the processor has none");
    }
    if features & 1 << 20 != 0 {
        cpu::set_cr4(cr4 | 1 << 21);
        fault("#PF SMAP read", load, urw, 1, At(&load_at));
        fault("#PF SMAP write", store, urw + 8, 3, At(&store_at));
        // SAFETY: only the AC flag changes.
        unsafe { core::arch::asm!("stac") };
        let open = catch(load, urw).is_none();
        // SAFETY: as above.
        unsafe { core::arch::asm!("clac") };
        check("SMAP with AC", open);
        fault("#PF SMAP after clac", load, urw, 1, At(&load_at));
        check("SMAP leaves supervisor pages", catch(load, rw).is_none());
        eq("SMAP leaves the user alone", DONE, user(load, uro).frame.vector);
        cpu::set_cr4(cr4);
    } else {
        report::skip("SMAP", "the processor has none");
    }
    let efer = cpu::rdmsr(msr::EFER);
    page::map(nx, 1, 0);
    page::map(unx, 1, 0);
    cpu::wrmsr(msr::EFER, efer & !(1 << 11));
    fault("#PF fetch absent without NXE", call_it, none + 64, 0, Is(none + 64));
    page::map(nx, 1, frame | P | W | NX);
    fault("#PF NX bit is reserved without NXE", load, nx, 9, At(&load_at));
    cpu::wrmsr(msr::EFER, efer);
    cpu::invlpg(nx);
    check("NX page reads with NXE", catch(load, nx).is_none());
}

fn debug() {
    let dr6 = || cpu::dr6() & 0xe00f;
    let clear = || cpu::set_dr6(0xffff_0ff0);
    clear();
    kernel("#DB single step", step, 0, 1, NO_ERROR, Behind(&step_at));
    eq("DR6.BS", 0x4000, dr6());
    clear();
    let buffer = page::fresh();
    let t = catch(step_rep, buffer);
    expect("#DB single step in REP", t, 1, NO_ERROR, At(&step_rep_at), None, false);
    eq("one repetition was done", 2, t.unwrap_or_default().frame.rcx);
    clear();
    kernel("#DB held off by mov ss", step_ss, 0, 1, NO_ERROR, Behind(&step_ss_at));
    clear();
    cpu::set_dr0(buffer + 8);
    cpu::set_dr7(0x400 | 1 | 0xd << 16);
    kernel("#DB data write", store, buffer + 8, 1, NO_ERROR, Behind(&store_at));
    eq("DR6.B0", 1, dr6());
    clear();
    // The range is 4 bytes; the store that ends just before it and the load do not count.
    check("no #DB beside the range", catch(store, buffer).is_none());
    check("no #DB on a read", catch(load, buffer + 8).is_none());
    kernel("#DB store over the range", store, buffer + 4, 1, NO_ERROR, Behind(&store_at));
    cpu::set_dr7(0x400 | 1 | 0xf << 16);
    clear();
    kernel("#DB data read", load, buffer + 8, 1, NO_ERROR, Behind(&load_at));
    cpu::set_dr7(0x400);
    cpu::set_dr1(quiet_at[0]);
    cpu::set_dr7(0x400 | 4);
    clear();
    let t = catch(quiet, 0);
    expect("#DB code breakpoint", t, 1, NO_ERROR, At(&quiet_at), None, false);
    eq("DR6.B1", 2, dr6());
    eq("code breakpoint pushes RF clear", 0, t.unwrap_or_default().frame.rflags & 1 << 16);
    static HITS: kit::Global<u64> = kit::Global::new(0);
    trap::handle(
        1,
        Some(|frame| {
            HITS.set(HITS.get() + 1);
            frame.rflags |= 1 << 16;
        }),
    );
    check("RF passes a code breakpoint", catch(quiet, 0).is_none());
    eq("hit once", 1, HITS.get());
    trap::handle(1, None);
    io_breakpoints();
    // DR6 first: general detect would stop that as well.
    clear();
    cpu::set_dr7(0x400 | 1 << 13);
    kernel("#DB general detect", from_dr0, 0, 1, NO_ERROR, At(&from_dr0_at));
    eq("DR6.BD", 0x2000, dr6());
    cpu::set_dr7(0x400);
    clear();
}

/// Port 80h is written by firmware to show how far it came: nothing depends on it.
fn io_breakpoints() {
    const PORT: u64 = 0x80;
    let clear = || cpu::set_dr6(0xffff_0ff0);
    let cr4 = cpu::cr4();
    cpu::set_dr2(PORT);
    cpu::set_dr7(0x400 | 1 << 4 | 2 << 24);
    clear();
    check("without CR4.DE no I/O breakpoint", catch(out_port, PORT).is_none());
    cpu::set_cr4(cr4 | 8);
    kernel("#DB out", out_port, PORT, 1, NO_ERROR, Behind(&out_port_at));
    eq("DR6.B2", 4, cpu::dr6() & 0xe00f);
    clear();
    kernel("#DB in", in_port, PORT, 1, NO_ERROR, Behind(&in_port_at));
    check("no #DB at the next port", catch(out_port, PORT + 1).is_none());
    kernel("#DB out of four bytes", out_port32, PORT - 2, 1, NO_ERROR, Behind(&out_port32_at));
    let t = catch(rep_out, PORT);
    expect("#DB rep outs", t, 1, NO_ERROR, At(&rep_out_at), None, false);
    eq("one byte was written", 2, t.unwrap_or_default().frame.rcx);
    cpu::set_dr7(0x400 | 1 << 4 | 6 << 24);
    clear();
    kernel("#DB out in a range of two", out_port, PORT + 1, 1, NO_ERROR, Behind(&out_port_at));
    cpu::set_dr7(0x400);
    check("no #DB when disabled", catch(out_port, PORT).is_none());
    cpu::set_cr4(cr4);
    clear();
}

fn from_user() {
    for (what, run, at) in PRIVILEGED {
        expect(what, Some(user(*run, 0)), 13, 0, At(at), None, true);
    }
    expect("user int 41h", Some(user(int41, 0)), 13, 0x41 * 8 + 2, At(&int41_at), None, true);
    expect("user int3", Some(user(int3, 0)), 3, NO_ERROR, Behind(&int3_at), None, true);
    expect("user ud2", Some(user(ud2, 0)), 6, NO_ERROR, At(&ud2_at), None, true);
    expect("user div", Some(user(div0, 0)), 0, NO_ERROR, At(&div0_at), None, true);
    expect("user ss null", Some(user(mov_ss, 0)), 13, 0, At(&mov_ss_at), None, true);
    expect("user ss of the supervisor", Some(user(mov_ss, 0x10)), 13, 0x10, At(&mov_ss_at), None, true);
    expect("user ds of the supervisor", Some(user(mov_ds, 0x10)), 13, 0x10, At(&mov_ds_at), None, true);
    eq("user ds of the user", DONE, user(mov_ds, sel::USER_DATA.into()).frame.vector);
    expect("user single step", Some(user(step, 0)), 1, NO_ERROR, Behind(&step_at), None, true);
    cpu::set_dr6(0xffff_0ff0);
    let t = user(u_popf, 0);
    eq("popf leaves IF and IOPL to the supervisor", 0, t.frame.rflags & 0x3200);
    let cr4 = cpu::cr4();
    eq("user rdtsc", DONE, user(u_rdtsc, 0).frame.vector);
    cpu::set_cr4(cr4 | 4);
    expect("user rdtsc with CR4.TSD", Some(user(u_rdtsc, 0)), 13, 0, At(&u_rdtsc_at), None, true);
    cpu::set_cr4(cr4);
    if cpu::cpuid(7, 0)[2] & 4 != 0 {
        cpu::set_cr4(cr4 | 1 << 11);
        expect("user sgdt with UMIP", Some(user(u_sgdt, 0)), 13, 0, At(&u_sgdt_at), None, true);
        expect("user smsw with UMIP", Some(user(u_smsw, 0)), 13, 0, At(&u_smsw_at), None, true);
        cpu::set_cr4(cr4);
    } else {
        report::skip("UMIP", "the processor has none");
    }
    eq("user sgdt without UMIP", DONE, user(u_sgdt, 0).frame.vector);

    // The I/O permission map: longer limit, port 80h open, 81h-83h closed.
    let tss = trap::TSS.addr();
    let limit = 0x68u64 + 8192;
    cpu::set_descriptor(
        sel::TASK,
        limit & 0xffff
            | (tss & 0xff_ffff) << 16
            | 0x89 << 40
            | (limit >> 16) << 48
            | (tss >> 24 & 0xff) << 56,
    );
    check("ltr", catch(ltr, sel::TASK.into()).is_none());
    // SAFETY: the byte for ports 80h-87h.
    unsafe { (*trap::TSS.ptr()).ports[0x10] = 0xfe };
    eq("user out to an open port", DONE, user(u_out80, 0).frame.vector);
    expect("user out over a closed port", Some(user(u_out80w, 0)), 13, 0, At(&u_out80w_at), None, true);
    // SAFETY: as above.
    unsafe { (*trap::TSS.ptr()).ports[0x10] = 0xff };
    expect("user out to a closed port", Some(user(u_out80, 0)), 13, 0, At(&u_out80_at), None, true);

    // #AC (vol. 3A, 7.15, interrupt 17).
    let cr0 = cpu::cr0();
    cpu::set_cr0(cr0 | 1 << 18);
    let mut entry = trap::user_entry(u_unaligned, 0);
    entry.rflags |= 1 << 18;
    expect("#AC", Some(trap::enter(&entry)), 17, 0, At(&u_unaligned_at), None, true);
    eq("no #AC without EFLAGS.AC", DONE, user(u_unaligned, 0).frame.vector);
    cpu::set_cr0(cr0);
    let mut entry = trap::user_entry(u_unaligned, 0);
    entry.rflags |= 1 << 18;
    eq("no #AC without CR0.AM", DONE, trap::enter(&entry).frame.vector);
    check("no #AC at CPL 0", catch(load32, tss + 1).is_none());
}

fn system_calls() {
    cpu::wrmsr(msr::STAR, 0x18 << 48 | 0x08 << 32);
    cpu::wrmsr(msr::LSTAR, syscall_door as *const () as u64);
    cpu::wrmsr(msr::SFMASK, 0x400);
    let t = user(u_syscall, 0);
    let seen = SEEN.get();
    eq("syscall: came back", DONE, t.frame.vector);
    eq("syscall: rcx", u_syscall_at[1] + USER, seen[0]);
    eq("syscall: r11 has CF and DF", 0x401, seen[1] & 0x401);
    eq("syscall: rsp is the user's", t.frame.r10, seen[2]);
    eq("syscall: cs", 0x08, seen[3]);
    eq("syscall: ss", 0x10, seen[4]);
    eq("syscall: SFMASK clears DF alone", 1, seen[5] & 0x401);
    eq("sysret: cs", sel::USER_CODE.into(), t.frame.cs);
    eq("sysret: ss", sel::USER_DATA.into(), t.frame.ss);
    eq("sysret: flags", 0x401, t.frame.rflags & 0x401);

    cpu::wrmsr(msr::GS_BASE, 0x1111);
    cpu::wrmsr(msr::KERNEL_GS_BASE, 0xffff_8000_0000_2222);
    // SAFETY: nobody uses GS.
    unsafe { core::arch::asm!("swapgs") };
    eq("swapgs: GS base", 0xffff_8000_0000_2222, cpu::rdmsr(msr::GS_BASE));
    eq("swapgs: kernel GS base", 0x1111, cpu::rdmsr(msr::KERNEL_GS_BASE));
    let at = SEEN.addr();
    SEEN.set([7, 8, 9, 10, 11, 12]);
    cpu::wrmsr(msr::GS_BASE, at);
    cpu::wrmsr(msr::FS_BASE, at + 8);
    let (gs, fs): (u64, u64);
    // SAFETY: reads the array above.
    unsafe { core::arch::asm!("mov {}, gs:[16]", "mov {}, fs:[0]", out(reg) gs, out(reg) fs) };
    eq("GS base is added", 9, gs);
    eq("FS base is added", 8, fs);
}

fn double_faults() {
    let on_ist = |t: &Trap| (trap::stack_top(1) - 4096..trap::stack_top(1)).contains(&t.at);
    let absent = |vector: usize| {
        let gate = trap::gate_to(vector);
        trap::set_gate(vector, [gate[0] & !(0x80 << 40), gate[1]]);
    };
    absent(14);
    let t = catch(load, TEST + 0x5000).unwrap_or_default();
    trap::set_gate(14, trap::gate_to(14));
    eq("#DF: page fault, then #NP", 8, t.frame.vector);
    eq("#DF: error code", 0, t.frame.error);
    check("#DF: on IST 1", on_ist(&t));
    absent(0);
    let t = catch(div0, 0).unwrap_or_default();
    trap::set_gate(0, trap::gate_to(0));
    eq("#DF: #DE, then #NP", 8, t.frame.vector);
    // Entries from the user on a bad stack.
    // SAFETY: the kit's own task state segment.
    unsafe { (*trap::TSS.ptr()).rsp[0] = TEST + 0x6000 };
    page::map(TEST + 0x5000, 1, 0);
    let t = user(quiet, 0);
    eq("#DF: no stack for the entry", 8, t.frame.vector);
    check("#DF from the user: on IST 1", on_ist(&t));
    eq("#DF from the user: cs", sel::USER_CODE.into(), t.frame.cs);
    // SAFETY: as above.
    unsafe { (*trap::TSS.ptr()).rsp[0] = 0x9000_0000_0000 };
    let t = user(quiet, 0);
    // SAFETY: as above.
    unsafe { (*trap::TSS.ptr()).rsp[0] = trap::stack_top(0) };
    // #SS has a stack of its own (IST 1).
    eq("#SS: non-canonical stack for the entry", 12, t.frame.vector);
    check("#SS: on IST 1", on_ist(&t));
    let t = user(quiet, 0);
    eq("entry from the user again", DONE, t.frame.vector);
    eq("entry from the user: top of stack", trap::stack_top(0) - 40, t.at);
}

fn flags_and_stack() {
    let flags = |t: Option<Trap>| t.unwrap_or_default().frame.rflags;
    eq("faults push RF", 1 << 16, flags(catch(load, TEST + 0x5000)) & 1 << 16);
    eq("traps push RF clear", 0, flags(catch(int41, 0)) & 1 << 16);
    static INSIDE: kit::Global<u64> = kit::Global::new(0);
    trap::handle(0x41, Some(|_| INSIDE.set(cpu::flags())));
    cpu::sti();
    catch(int41, 0);
    eq("interrupt gate clears IF", 0, INSIDE.get() & 0x200);
    eq("IRET brings IF back", 0x200, cpu::flags() & 0x200);
    let gate = trap::gate_to(0x41);
    trap::set_gate(0x41, [gate[0] | 1 << 40, gate[1]]);
    catch(int41, 0);
    eq("trap gate leaves IF", 0x200, INSIDE.get() & 0x200);
    cpu::cli();
    trap::set_gate(0x41, gate);
    trap::handle(0x41, None);
    // The stack is aligned before the frame is pushed.
    let t = catch(pushed, 0).unwrap_or_default();
    eq("pushed rsp is the old one", 8, t.frame.rsp & 15);
    eq("frame is aligned to 16", 0, (t.at + 40) & 15);
    check("frame is below", t.frame.rsp - t.at >= 40 && t.frame.rsp - t.at < 56);
}
snippet!(pushed, pushed_at, "and rsp, -16; push 0", "int3");
