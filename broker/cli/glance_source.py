"""Reads the images of a running Glance with openstacksdk, which knows clouds.yaml, the OS_* variables and Keystone.

The credential has to be an administrator's: others are shown neither all images nor their locations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from broker.client.trouble import ClientError, WrongSetting

_PAGE = 500


class Glance:
    """A connection to the image service of a cloud, by its name in clouds.yaml, else by OS_CLOUD and the other OS_* variables.

    Raises `WrongSetting` without openstacksdk or without a cloud. What goes wrong on the way is a `ClientError`, told without its text,
    which may quote a request.
    """

    def __init__(self, cloud: str | None) -> None:
        try:
            import openstack
            from keystoneauth1 import exceptions as keystone
        except ImportError:
            raise WrongSetting("openstacksdk is not installed", "in the checkout: pip install -e '.[openstack]'") from None
        self._errors = (keystone.ClientException, openstack.exceptions.SDKException)
        try:
            self._image: Any = openstack.connect(cloud=cloud).image
        except (keystone.DiscoveryFailure, keystone.ConnectionError, keystone.Unauthorized) as error:
            kind = type(error).__name__
            raise ClientError(f"no login at the cloud ({kind})", "are its auth_url and its credential right, and does it run?") from None
        except self._errors as error:
            raise WrongSetting(
                f"no cloud to read from ({type(error).__name__})", "name one of clouds.yaml by --cloud, or set the OS_* variables"
            ) from None

    def images(self) -> Iterator[dict[str, Any]]:
        """Every image, those hidden from lists too, as Glance shows it; shared ones with ``members``, project to status."""
        for hidden in ("false", "true"):
            path: str | None = f"/images?visibility=all&member_status=all&os_hidden={hidden}&sort=created_at:asc&limit={_PAGE}"
            while path is not None:
                page = self._get(path)
                for image in page["images"]:
                    yield self._with_members(image)
                following = page.get("next")
                path = None if following is None else following.removeprefix("/v2")

    def _with_members(self, image: dict[str, Any]) -> dict[str, Any]:
        if image.get("visibility") != "shared":
            return image
        found = self._get(f"/images/{image['id']}/members")["members"]
        return {**image, "members": {member["member_id"]: member["status"] for member in found}}

    def _get(self, path: str) -> dict[str, Any]:
        try:
            answer = self._image.get(path)
        except self._errors as error:
            raise ClientError(f"Glance cannot be read ({type(error).__name__})", "is the cloud's image endpoint right?") from None
        if answer.status_code != 200:
            raise ClientError(f"Glance answers {answer.status_code}", "the credential has to be an administrator's")
        found: dict[str, Any] = answer.json()
        return found
