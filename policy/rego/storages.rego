# SPDX-License-Identifier: Apache-2.0
# Whether an agent may mount what a node asks it to, for a container's root that is made of tardev layers.
#
# input:  {"storages": [...], "container_id": "..."}, of CreateContainerRequest
# data:   policy_data.containers[_].storages, as Microsoft's genpolicy writes them
#
# `allow` holds for exactly the storages of one container of the policy. `reasons` says, for each container by its place,
# what is against them: which rule, of which storage, and which field.
package tardev.storages

import rego.v1

layers_prefix := "io.katacontainers.fs-opt.layer-src-prefix=/var/lib/containerd/io.containerd.snapshotter.v1.tardev/layers"

layer_directory := "/run/kata-containers/sandbox/layers/"

container_directory := "/run/kata-containers/shared/containers/"

default allow := false

allow if {
	some container in data.policy_data.containers
	count(against(container)) == 0
}

reasons[number] := found if {
	some number
	container := data.policy_data.containers[number]
	found := against(container)
	count(found) > 0
}

against(container) := (count_is_wrong(container) | layers_are_wrong(container)) | (layer_is_wrong(container) | overlay_is_wrong(container))

# The policy's names, topmost first, and their root hashes.

overlay_of(container) := overlays[0] if {
	overlays := [each | some each in container.storages; each.driver == "overlayfs"]
	count(overlays) == 1
}

names_of(container) := split(overlay_of(container).options[0], ":")

hashes_of(container) := split(overlay_of(container).options[1], ":")

numbers_of(container) := numbers.range(0, count(names_of(container)) - 1)

# The request.

is_overlay(storage) if storage.driver == "overlayfs"

count_is_wrong(container) := {{"rule": "count", "storage": -1, "field": "storages"} | count(input.storages) != count(container.storages)}

# Each layer once, in the policy's order.
layers_are_wrong(container) := {{"rule": "layers", "storage": -1, "field": "mount_point"} | points := [storage.mount_point | some storage in input.storages; not is_overlay(storage)]; wanted := [concat("", [layer_directory, name]) | some name in names_of(container)]; points != wanted}

layer_is_wrong(container) := {{"rule": "layer", "storage": number, "field": field} | some number; storage := input.storages[number]; not is_overlay(storage); some field in wrong_fields_of_layer(container, storage)}

overlay_is_wrong(container) := one_overlay | {{"rule": "overlay", "storage": number, "field": field} | some number; storage := input.storages[number]; is_overlay(storage); some field in wrong_fields_of_overlay(container, storage)}

one_overlay := {{"rule": "overlay", "storage": -1, "field": "driver"} | overlays := [storage | some storage in input.storages; is_overlay(storage)]; count(overlays) != 1}

wrong_fields_of_layer(container, storage) := wrong_fields([["driver", storage.driver, "blk"], ["driver_options", storage.driver_options, []], ["fs_group", storage.fs_group, null], ["options", storage.options, layer_options(container, storage.mount_point)]])

wrong_fields_of_overlay(container, storage) := wrong_fields([["driver_options", storage.driver_options, []], ["fs_group", storage.fs_group, null], ["mount_point", storage.mount_point, concat("", [container_directory, input.container_id])], ["options", storage.options, overlay_options(container)]])

wrong_fields(checks) := {check[0] | some check in checks; check[1] != check[2]}

default layer_options(_, _) := false

layer_options(container, mount_point) := options_of(container, number) if {
	some number in numbers_of(container)
	mount_point == concat("", [layer_directory, names_of(container)[number]])
}

options_of(container, number) := [
	"ro",
	"io.katacontainers.fs-opt.block_device=file",
	"io.katacontainers.fs-opt.is-layer",
	concat("", ["io.katacontainers.fs-opt.root-hash=", hashes_of(container)[number]]),
]

overlay_options(container) := array.concat(array.concat([layers_prefix], [concat("", ["io.katacontainers.fs-opt.layer=", base64.encode(layer_text(container, number))]) | some number in numbers_of(container)]), ["io.katacontainers.fs-opt.overlay-rw", concat("", ["lowerdir=", overlay_of(container).options[0]])])

layer_text(container, number) := concat(",", array.concat([names_of(container)[number], "tar"], options_of(container, number)))
