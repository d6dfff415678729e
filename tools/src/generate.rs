//! `crxfer keygen`, `completions` and `man`: files that are made once.

use std::fs;

use clap::CommandFactory;
use crxfer::transport::Identity;

use crate::args::{Cli, CompletionsArgs, KeygenArgs, ManArgs};
use crate::error::Failed;
use crate::output;

pub(crate) fn keygen(args: &KeygenArgs) -> Result<(), Failed> {
    let identity = Identity::generate()?;
    identity.save(&args.file)?;
    output::line(&identity.fingerprint().to_string())
}

pub(crate) fn completions(args: &CompletionsArgs) -> Result<(), Failed> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "crxfer", &mut script);
    output::raw(&script)
}

pub(crate) fn man(args: &ManArgs) -> Result<(), Failed> {
    // `help` has no page: it only repeats the others.
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    let Some(dir) = &args.dir else {
        return output::raw(page(command)?.1.as_bytes());
    };
    fs::create_dir_all(dir).map_err(Failed::file("create", dir))?;
    let commands: Vec<_> = command.get_subcommands().cloned().collect();
    for command in commands.into_iter().chain([command]) {
        let (name, text) = page(command)?;
        let path = dir.join(name);
        fs::write(&path, text).map_err(Failed::file("write", &path))?;
    }
    Ok(())
}

/// File name and text of one man page, with the end of the help in sections of their own.
fn page(command: clap::Command) -> Result<(String, String), Failed> {
    let man = clap_mangen::Man::new(command);
    let mut text = Vec::new();
    man.render(&mut text).map_err(Failed::Output)?;
    let text = String::from_utf8_lossy(&text);
    let (before, rest) = text.split_once(".SH EXTRA\n").unwrap_or((&text, ""));
    let (extra, after) = match rest.find(".SH ") {
        Some(at) => rest.split_at(at),
        None => (rest, ""),
    };
    let extra = extra
        .replace("Examples:\n", ".SH EXAMPLES\n.nf\n")
        .replace("Exit codes:\n", ".fi\n.SH \"EXIT STATUS\"\n.nf\n");
    let end = if extra.is_empty() { "" } else { "\n.fi\n" };
    let text = format!("{before}{}{end}{after}", extra.trim_end());
    Ok((man.get_filename(), text))
}
