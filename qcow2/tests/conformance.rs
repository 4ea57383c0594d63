//! The rules that every device obeys, over the kinds of images.
#![allow(missing_docs)]

mod common;

use std::sync::Arc;

use brep_block::conformance::{Options, run};
use brep_block::{BlockDevice, Memory};
use brep_qcow2::{CreateOptions, OpenOptions, Qcow2};

async fn conforms(create: CreateOptions, open: OpenOptions, with_backing: bool, options: Options) {
    let make = async |size: u64| {
        let file = common::memory();
        let create = CreateOptions { size, ..create.clone() };
        common::create(&file, &create).await;
        let backing: Option<Arc<dyn BlockDevice>> =
            if with_backing { Some(Memory::new("backing", size)) } else { None };
        let open = OpenOptions { backing, ..open.clone() };
        Qcow2::open(file, open).await.unwrap()
    };
    run(make, options.size_unit(512).operations(200)).await.unwrap();
}

#[tokio::test]
async fn a_standard_image_obeys_the_rules() {
    let options = Options::default();
    conforms(CreateOptions::default(), OpenOptions::default(), false, options).await;
}

#[tokio::test]
async fn an_image_with_subclusters_obeys_the_rules() {
    let create = CreateOptions { extended_l2: true, ..CreateOptions::default() };
    let open = OpenOptions { ordered: false, ..OpenOptions::default() };
    conforms(create, open, false, Options::default()).await;
}

#[tokio::test]
async fn an_image_over_another_obeys_the_rules() {
    conforms(CreateOptions::default(), OpenOptions::default(), true, Options::default()).await;
    let create = CreateOptions { extended_l2: true, cluster_bits: 14, ..Default::default() };
    conforms(create, OpenOptions::default(), true, Options::default()).await;
}

async fn conforms_with_clusters(cluster_bits: u32, refcount_order: u32) {
    let create = CreateOptions { cluster_bits, refcount_order, ..CreateOptions::default() };
    conforms(create, OpenOptions::default(), false, Options::default()).await;
}

#[tokio::test]
async fn an_image_with_clusters_of_512_bytes_obeys_the_rules() {
    conforms_with_clusters(9, 6).await;
}

#[tokio::test]
async fn an_image_with_clusters_of_1_kib_obeys_the_rules() {
    conforms_with_clusters(10, 0).await;
}

#[tokio::test]
async fn an_image_with_clusters_of_2_mib_obeys_the_rules() {
    conforms_with_clusters(21, 3).await;
}

#[tokio::test]
async fn a_version_2_image_obeys_the_rules() {
    let create = CreateOptions { version: 2, ..CreateOptions::default() };
    conforms(create, OpenOptions::default(), false, Options::default()).await;
}
