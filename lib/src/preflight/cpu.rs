//! Which features of a processor a moved program may already rely on.

/// Features that programs ask for once, at their start, and then use: the C library alone chooses its
/// `memcpy` by several of them. On a host without them the next such instruction is SIGILL. Everything
/// else in /proc/cpuinfo is the kernel's business, a matter of speed, or about bugs.
const X86: &[&str] = &[
    "3dnow",
    "3dnowext",
    "3dnowprefetch",
    "abm",
    "adx",
    "aes",
    "avx",
    "avx2",
    "avx_vnni",
    "bmi1",
    "bmi2",
    "clflushopt",
    "clwb",
    "clzero",
    "cmpccxadd",
    "cx16",
    "cx8",
    "enqcmd",
    "f16c",
    "fma",
    "fma4",
    "fsgsbase",
    "fxsr",
    "gfni",
    "lahf_lm",
    "lwp",
    "mmx",
    "mmxext",
    "monitorx",
    "movbe",
    "movdir64b",
    "movdiri",
    "ospke",
    "pclmulqdq",
    "pni",
    "popcnt",
    "prefetchwt1",
    "rdpid",
    "rdrand",
    "rdseed",
    "rdtscp",
    "rtm",
    "serialize",
    "sha512",
    "sha_ni",
    "sm3",
    "sm4",
    "sse",
    "sse2",
    "sse4_1",
    "sse4_2",
    "sse4a",
    "ssse3",
    "tbm",
    "vaes",
    "vpclmulqdq",
    "waitpkg",
    "xgetbv1",
    "xop",
    "xsave",
    "xsavec",
];

/// Families of features that grow with each generation.
const X86_FAMILIES: [&str; 4] = ["avx512", "avx10", "amx_", "avx_"];

/// Features of arm64 that are no instructions of their own.
const ARM_HARMLESS: [&str; 4] = ["cpuid", "evtstrm", "dgh", "ecv"];

/// What the source has, a program may rely on, and the destination lacks.
pub(super) fn missing<'a>(
    machine: &str,
    source: &'a [String],
    destination: &[String],
) -> Vec<&'a str> {
    let lacks = |feature: &&str| !destination.iter().any(|theirs| theirs == feature);
    let all = source.iter().map(String::as_str);
    all.filter(|feature| is_used(machine, feature))
        .filter(lacks)
        .collect()
}

fn is_used(machine: &str, feature: &str) -> bool {
    match machine {
        "x86_64" | "i386" | "i486" | "i586" | "i686" => {
            X86.contains(&feature)
                || X86_FAMILIES
                    .iter()
                    .any(|family| feature.starts_with(family))
        }
        _ => !ARM_HARMLESS.contains(&feature),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(machine: &str, source: &[&str], destination: &[&str]) -> Vec<String> {
        let own = |list: &[&str]| list.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
        let source = own(source);
        missing(machine, &source, &own(destination))
            .into_iter()
            .map(str::to_owned)
            .collect()
    }

    #[test]
    fn only_what_programs_use_and_the_destination_lacks_matters() {
        let source = [
            "avx2",
            "avx512_fp16",
            "constant_tsc",
            "erms",
            "sse2",
            "umip",
        ];
        assert_eq!(
            of("x86_64", &source, &["sse2", "avx"]),
            ["avx2", "avx512_fp16"]
        );
        assert!(of("x86_64", &["sse2"], &["avx2", "sse2"]).is_empty());
        assert_eq!(
            of("aarch64", &["asimd", "evtstrm", "sve"], &["asimd"]),
            ["sve"]
        );
    }
}
