//! `cargo xtask proto`: Rust from the `.proto` files, without `protoc`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fs, io};

use prost_build::Module;

/// Where the `.proto` files are and where their Rust goes, beneath the workspace.
const SOURCES: &str = "proto";
const GENERATED: &str = "proto/src/generated";

/// What can go wrong while generating.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProtoError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("compiling the .proto files")]
    Compile(#[from] Box<protox::Error>),
    #[error("generating Rust from the .proto files: {0}")]
    Generate(io::Error),
    #[error("{0} is not what its .proto files give: run `cargo xtask proto` and commit the result")]
    Stale(PathBuf),
}

/// Compiles every `.proto` file below `proto/` into `proto/src/generated/PACKAGE.rs`.
///
/// With `check` nothing is written: a file that would change, appear or vanish is an error.
pub(crate) fn run(workspace: &Path, check: bool) -> Result<(), ProtoError> {
    let generated = generate(&workspace.join(SOURCES))?;
    let folder = workspace.join(GENERATED);
    let stale = stale_files(&folder, &generated)?;
    if check {
        return stale
            .into_iter()
            .next()
            .map_or(Ok(()), |path| Err(ProtoError::Stale(path)));
    }
    fs::create_dir_all(&folder).map_err(at(&folder))?;
    for path in stale {
        match generated.get(
            &path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
        ) {
            Some(text) => fs::write(&path, text).map_err(at(&path))?,
            None => fs::remove_file(&path).map_err(at(&path))?,
        }
        println!("{}", path.display());
    }
    Ok(())
}

/// File name to text, one for each protobuf package.
fn generate(sources: &Path) -> Result<BTreeMap<String, String>, ProtoError> {
    let mut files = Vec::new();
    find_proto_files(sources, &mut files)?;
    files.sort();
    let descriptors = protox::compile(&files, [sources]).map_err(Box::new)?;
    let requests = descriptors
        .file
        .into_iter()
        .map(|file| (Module::from_protobuf_package_name(file.package()), file))
        .collect();
    let modules = prost_build::Config::new()
        .generate(requests)
        .map_err(ProtoError::Generate)?;
    Ok(modules
        .into_iter()
        .map(|(module, text)| (module.to_file_name_or("_"), text))
        .collect())
}

/// Files in `folder` that differ from `generated`, that it lacks, or that it has beside them.
fn stale_files(
    folder: &Path,
    generated: &BTreeMap<String, String>,
) -> Result<Vec<PathBuf>, ProtoError> {
    let mut stale = Vec::new();
    for (name, text) in generated {
        let path = folder.join(name);
        match fs::read_to_string(&path) {
            Ok(old) if old == *text => {}
            Ok(_) => stale.push(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => stale.push(path),
            Err(source) => return Err(ProtoError::Io { path, source }),
        }
    }
    let listing = match fs::read_dir(folder) {
        Ok(listing) => listing,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(stale),
        Err(source) => {
            return Err(ProtoError::Io {
                path: folder.to_owned(),
                source,
            });
        }
    };
    for entry in listing {
        let entry = entry.map_err(at(folder))?;
        if !generated.contains_key(entry.file_name().to_string_lossy().as_ref()) {
            stale.push(entry.path());
        }
    }
    Ok(stale)
}

fn find_proto_files(folder: &Path, found: &mut Vec<PathBuf>) -> Result<(), ProtoError> {
    for entry in fs::read_dir(folder).map_err(at(folder))? {
        let path = entry.map_err(at(folder))?.path();
        if path.is_dir() {
            find_proto_files(&path, found)?;
        } else if path
            .extension()
            .is_some_and(|extension| extension == "proto")
        {
            found.push(path);
        }
    }
    Ok(())
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> ProtoError {
    let path = path.to_owned();
    move |source| ProtoError::Io { path, source }
}
