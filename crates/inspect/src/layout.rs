//! [`Layout`]: where the fields of the kernel's structures are, asked of its own types once.
//!
//! What a kernel does not have is `None`; whoever needs it says "unknown" then.

use crate::orc::Bits;
use crate::{Types, VmCoreInfo};

macro_rules! layout {
    ($(#[$doc:meta])* $name:ident { $($field:ident: $structure:literal [$($path:literal),+];)* }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default)]
        pub(crate) struct $name { $(pub(crate) $field: Option<u64>,)* }
        impl $name {
            fn new(types: &Types) -> $name {
                $name { $($field: types.offset_of($structure, &[$($path),+]),)* }
            }
        }
    };
}

layout! {
    /// `task_struct` and what hangs on it.
    Task {
        tasks: "task_struct" ["tasks"];
        leader: "task_struct" ["group_leader"];
        parent: "task_struct" ["real_parent"];
        pid: "task_struct" ["pid"];
        tgid: "task_struct" ["tgid"];
        comm: "task_struct" ["comm"];
        mm: "task_struct" ["mm"];
        state: "task_struct" ["__state", "state"];
        exit_state: "task_struct" ["exit_state"];
        flags: "task_struct" ["flags"];
        cpu: "task_struct" ["thread_info.cpu", "cpu"];
        stack: "task_struct" ["stack"];
        sp: "task_struct" ["thread.sp"];
        start: "task_struct" ["start_boottime", "real_start_time"];
        start_unique: "task_struct" ["start_time"];
        utime: "task_struct" ["utime"];
        stime: "task_struct" ["stime"];
        runtime: "task_struct" ["se.sum_exec_runtime"];
        cred: "task_struct" ["cred"];
        uid: "cred" ["uid"];
        signal: "task_struct" ["signal"];
        thread_head: "signal_struct" ["thread_head"];
        thread_node: "task_struct" ["thread_node"];
    }
}

layout! {
    /// `mm_struct`, its areas and files.
    Memory {
        pgd: "mm_struct" ["pgd"];
        tree: "mm_struct" ["mm_mt"];
        list: "mm_struct" ["mmap"];
        exe: "mm_struct" ["exe_file"];
        total: "mm_struct" ["total_vm"];
        arg_start: "mm_struct" ["arg_start"];
        arg_end: "mm_struct" ["arg_end"];
        brk_start: "mm_struct" ["start_brk"];
        brk: "mm_struct" ["brk"];
        stack: "mm_struct" ["start_stack"];
        vdso: "mm_struct" ["context.vdso"];
        rss: "mm_struct" ["rss_stat"];
        rss_count: "mm_rss_stat" ["count"];
        percpu_counter: "percpu_counter" ["count"];
        area_start: "vm_area_struct" ["vm_start"];
        area_end: "vm_area_struct" ["vm_end"];
        area_flags: "vm_area_struct" ["vm_flags"];
        area_offset: "vm_area_struct" ["vm_pgoff"];
        area_file: "vm_area_struct" ["vm_file"];
        area_ops: "vm_area_struct" ["vm_ops"];
        area_private: "vm_area_struct" ["vm_private_data"];
        special_name: "vm_special_mapping" ["name"];
        area_next: "vm_area_struct" ["vm_next"];
        tree_root: "maple_tree" ["ma_root"];
        range_pivot: "maple_range_64" ["pivot"];
        range_slot: "maple_range_64" ["slot"];
        arange_pivot: "maple_arange_64" ["pivot"];
        arange_slot: "maple_arange_64" ["slot"];
        file_dentry: "file" ["f_path.dentry"];
        file_mount: "file" ["f_path.mnt"];
        file_inode: "file" ["f_inode"];
        file_mapping: "file" ["f_mapping"];
        dentry_parent: "dentry" ["d_parent"];
        dentry_name: "dentry" ["d_name.name"];
        dentry_name_len: "dentry" ["d_name.len"];
        dentry_hash: "dentry" ["d_hash.pprev"];
        mount_vfs: "mount" ["mnt"];
        mount_parent: "mount" ["mnt_parent"];
        mount_point: "mount" ["mnt_mountpoint"];
        mount_root: "vfsmount" ["mnt_root"];
        inode_number: "inode" ["i_ino"];
        inode_super: "inode" ["i_sb"];
        inode_size: "inode" ["i_size"];
        super_dev: "super_block" ["s_dev"];
        mapping_pages: "address_space" ["i_pages"];
        pages_head: "xarray" ["xa_head"];
        node_shift: "xa_node" ["shift"];
        node_slots: "xa_node" ["slots"];
        page_mapping: "page" ["mapping"];
        page_index: "page" ["index", "__folio_index"];
    }
}

layout! {
    /// `module`.
    Modules {
        list: "module" ["list"];
        name: "module" ["name"];
        state: "module" ["state"];
        build_id: "module" ["build_id"];
        core_base: "module" ["core_layout.base"];
        core_size: "module" ["core_layout.size"];
        core_text: "module" ["core_layout.text_size"];
        memory: "module" ["mem"];
        memory_base: "module_memory" ["base"];
        memory_size: "module_memory" ["size"];
        kallsyms: "module" ["kallsyms"];
        table: "mod_kallsyms" ["symtab"];
        table_count: "mod_kallsyms" ["num_symtab"];
        table_text: "mod_kallsyms" ["strtab"];
        table_kinds: "mod_kallsyms" ["typetab"];
        orc_count: "module" ["arch.num_orcs"];
        orc_places: "module" ["arch.orc_unwind_ip"];
        orc_entries: "module" ["arch.orc_unwind"];
    }
}

/// All of them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Layout {
    pub(crate) task: Task,
    pub(crate) memory: Memory,
    pub(crate) modules: Modules,
    /// Size of `page`.
    pub(crate) page_size: Option<u64>,
    /// Size of `module_memory`.
    pub(crate) module_memory_size: Option<u64>,
    /// Bytes of a member of `rss_stat`.
    pub(crate) rss_step: Option<u64>,
    /// How an ORC entry is written.
    pub(crate) orc: Option<Bits>,
    /// Offset of `current_task` in `pcpu_hot`, where that is.
    pub(crate) hot_task: Option<u64>,
    /// Offset of `cpu_number` in `pcpu_hot`.
    pub(crate) hot_cpu: Option<u64>,
}

impl Layout {
    pub(crate) fn new(types: Option<&Types>, info: &VmCoreInfo) -> Layout {
        let Some(types) = types else {
            return Layout { page_size: info.size("page"), ..Layout::default() };
        };
        Layout {
            task: Task::new(types),
            memory: Memory::new(types),
            modules: Modules::new(types),
            page_size: types.size("page").or_else(|| info.size("page")),
            module_memory_size: types.size("module_memory"),
            rss_step: types.size("percpu_counter"),
            orc: types.field("orc_entry", "type").and_then(|field| {
                // Within the last two of six bytes.
                let end = types.field("orc_entry", "end");
                let end = end.and_then(|end| (end.offset as u32 * 8 + end.bit).checked_sub(32));
                Some(Bits { kind: field.bits?, end: end.filter(|bit| *bit < 16) })
            }),
            hot_task: types.offset("pcpu_hot", "current_task"),
            hot_cpu: types.offset("pcpu_hot", "cpu_number"),
        }
    }
}
